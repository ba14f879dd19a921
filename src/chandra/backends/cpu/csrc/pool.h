// The thread pool every CPU kernel runs on.
//
// One pool serves all engines of the process. The calling thread takes part in the work; the others spin for a moment
// after a job, so that the next op of a step finds them awake, and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace chandra {

// Physical cores this process may use: its affinity mask, without hyperthread siblings, within its cgroup's quota.
int usable_cores();

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // The pool of this process; a forked child gets its own. Do not keep the reference across a fork.
  static Pool& shared();

  int size() const { return size_.load(std::memory_order_relaxed); }

  // Threads including the caller; 0 means usable_cores(). Not from within a task.
  void resize(int threads);

  // Calls f(task, worker) for every task in [0, n_tasks) and returns when all are done. worker is in [0, size()) and
  // no two tasks with the same worker run at once. Jobs of several threads take turns; a run within a task executes
  // inline. The first exception a task throws is rethrown here, tasks not yet begun are then left out.
  template <class F>
  void run(int64_t n_tasks, F&& f) {
    using Fn = std::remove_reference_t<F>;
    run_erased(
        n_tasks, [](void* fn, int64_t task, int worker) { (*static_cast<Fn*>(fn))(task, worker); },
        const_cast<void*>(static_cast<const void*>(std::addressof(f))));
  }

 private:
  using Call = void (*)(void* fn, int64_t task, int worker);

  void run_erased(int64_t n_tasks, Call call, void* fn);
  void work(int worker);
  bool run_one(int worker);
  bool has_work() const;
  void worker_main(int worker);
  void start(int threads);
  void stop();

  std::mutex callers_;  // held for the length of a job
  std::vector<std::thread> threads_;
  std::atomic<int> size_{1};

  // The job. A worker claims a task by advancing `ticket_` (epoch << 32 | next task); since that only succeeds while
  // the job it looked at is still the current one, nobody has to wait for workers that come late or not at all.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> n_tasks_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<void*> fn_{nullptr};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by whoever turns failed_ to true

  alignas(64) std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace chandra
