#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace chandra {
namespace {

constexpr auto kSpin = std::chrono::microseconds(80);

thread_local int current_worker = -1;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Marks this thread as running tasks, so that a run within a task executes inline.
struct Running {
  explicit Running(int worker) { current_worker = worker; }
  ~Running() { current_worker = -1; }
};

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs the cgroup's quota (v2 or v1) is worth, 0 if there is none.
int quota_cores() {
  std::ifstream groups("/proc/self/cgroup");
  std::string v2 = "/sys/fs/cgroup";
  for (std::string line; std::getline(groups, line);) {
    if (line.rfind("0::", 0) == 0) v2 += line.substr(3);
  }
  double quota = 0, period = 0;
  try {
    for (const std::string& dir : {v2, std::string("/sys/fs/cgroup")}) {
      const std::string max = first_line(dir + "/cpu.max");
      const size_t space = max.find(' ');
      if (space == std::string::npos || max.rfind("max", 0) == 0) continue;
      quota = std::stod(max), period = std::stod(max.substr(space));
      break;
    }
    if (quota <= 0) {
      quota = std::stod(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"));
      period = std::stod(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
    }
  } catch (const std::logic_error&) {  // no such file, or not a number
  }
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(quota / period + 0.5)) : 0;
}

// The shared pool lives on the heap and is never destroyed: at exit its threads may still be asleep in it.
std::atomic<Pool*> shared_pool{nullptr};
std::mutex shared_mutex;
int forked_size = 0;  // the parent's size, for the child's pool

void before_fork() { shared_mutex.lock(); }
void after_fork() { shared_mutex.unlock(); }
void after_fork_in_child() {
  if (Pool* pool = shared_pool.load()) forked_size = pool->size();
  shared_pool.store(nullptr);  // its threads do not exist here
  current_worker = -1;
  shared_mutex.unlock();
}

}  // namespace

int usable_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return std::max(1u, std::thread::hardware_concurrency());
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    const std::string siblings = first_line(topology + "thread_siblings_list");
    cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
  }
  const int n = std::max(1, static_cast<int>(cores.size()));
  const int quota = quota_cores();
  return quota ? std::min(n, quota) : n;
}

Pool::Pool(int threads) { start(threads); }

Pool::~Pool() { stop(); }

Pool& Pool::shared() {
  if (Pool* pool = shared_pool.load(std::memory_order_acquire)) return *pool;
  static const int registered = pthread_atfork(before_fork, after_fork, after_fork_in_child);
  (void)registered;
  const std::lock_guard lock(shared_mutex);
  if (Pool* pool = shared_pool.load()) return *pool;
  Pool* pool = new Pool(forked_size);
  shared_pool.store(pool, std::memory_order_release);
  return *pool;
}

void Pool::resize(int threads) {
  if (current_worker >= 0) throw std::logic_error("the pool cannot be resized from within a task");
  const std::lock_guard lock(callers_);
  if (threads == size()) return;
  stop();
  start(threads);
}

void Pool::start(int threads) {
  size_ = threads > 0 ? threads : usable_cores();
  stopping_ = false;
  for (int worker = 1; worker < size(); ++worker) threads_.emplace_back([this, worker] { worker_main(worker); });
}

void Pool::stop() {
  {
    const std::lock_guard lock(sleep_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

bool Pool::has_work() const {
  const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
  return static_cast<int64_t>(ticket & 0xffffffffu) < n_tasks_.load(std::memory_order_seq_cst);
}

bool Pool::run_one(int worker) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  Call call;
  void* fn;
  int64_t task;
  do {
    task = static_cast<int64_t>(ticket & 0xffffffffu);
    if (task >= n_tasks_.load(std::memory_order_acquire)) return false;
    call = call_.load(std::memory_order_relaxed);
    fn = fn_.load(std::memory_order_relaxed);
  } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
  if (!failed_.load(std::memory_order_relaxed)) {
    try {
      call(fn, task, worker);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void Pool::work(int worker) {
  const Running running(worker);
  while (run_one(worker)) {
  }
}

void Pool::worker_main(int worker) {
  while (!stopping_.load(std::memory_order_relaxed)) {
    work(worker);
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32 && !has_work(); ++i) pause();
    } while (!has_work() && !stopping_.load(std::memory_order_relaxed) && std::chrono::steady_clock::now() < until);
    if (has_work()) continue;
    std::unique_lock lock(sleep_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);  // before the last look for work; see run_erased
    wake_.wait(lock, [this] { return has_work() || stopping_.load(std::memory_order_relaxed); });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }
}

void Pool::run_erased(int64_t n_tasks, Call call, void* fn) {
  if (n_tasks <= 0) return;
  if (n_tasks > INT32_MAX) throw std::length_error("too many tasks for one job");
  if (current_worker >= 0) {
    for (int64_t task = 0; task < n_tasks; ++task) call(fn, task, current_worker);
    return;
  }
  const std::lock_guard lock(callers_);
  if (n_tasks == 1 || size() == 1) {
    const Running running(0);
    for (int64_t task = 0; task < n_tasks; ++task) call(fn, task, 0);
    return;
  }
  // All tasks of the last job are claimed. n_tasks_ is 0 until the new ticket is out: whoever reads the new number
  // cannot claim with the old ticket.
  done_.store(0, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  call_.store(call, std::memory_order_relaxed);
  fn_.store(fn, std::memory_order_relaxed);
  const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  n_tasks_.store(0, std::memory_order_relaxed);
  ticket_.store(epoch << 32, std::memory_order_release);
  n_tasks_.store(n_tasks, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    { const std::lock_guard wake(sleep_); }  // whoever is about to sleep has seen the job or waits by now
    wake_.notify_all();
  }
  work(0);
  for (int spins = 0; done_.load(std::memory_order_acquire) < n_tasks; ++spins) {
    if (spins < 4096) {
      pause();
    } else {
      sched_yield();  // a worker lost its core in the middle of a task
    }
  }
  if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace chandra
