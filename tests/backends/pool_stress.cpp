// Exercises the thread pool from several threads; test_cpu_pool.py builds it with the thread sanitizer and runs it.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pool.h"

using chandra::Pool;

#define CHECK(condition) \
  if (!(condition)) std::printf("failed: %s (line %d)\n", #condition, __LINE__), std::exit(1)

static void every_task_runs_once(int jobs) {
  for (int job = 0; job < jobs; ++job) {
    std::vector<int> hits(1 + job % 67, 0);
    Pool::shared().run(static_cast<int64_t>(hits.size()), [&](int64_t task, int) { hits[task]++; });
    for (int hit : hits) CHECK(hit == 1);
  }
}

static void workers_are_exclusive() {
  std::vector<int64_t> sum(Pool::shared().size(), 0);
  Pool::shared().run(10000, [&](int64_t task, int worker) { sum[worker] += task; });
  CHECK(std::accumulate(sum.begin(), sum.end(), int64_t{0}) == 10000LL * 9999 / 2);
}

static void exceptions_propagate() {
  bool caught = false;
  try {
    Pool::shared().run(100, [](int64_t task, int) {
      if (task == 37) throw std::runtime_error("37");
    });
  } catch (const std::runtime_error& error) {
    caught = !std::strcmp(error.what(), "37");
  }
  CHECK(caught);
}

static void nested_runs_are_inline() {
  std::atomic<int> count{0};
  Pool::shared().run(8, [&](int64_t, int outer) {
    Pool::shared().run(8, [&](int64_t, int inner) {
      CHECK(inner == outer);
      count++;
    });
  });
  CHECK(count == 64);
}

static void sleepers_wake() {
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::microseconds(50 + 20 * i));
    every_task_runs_once(3);
  }
}

static void idle_costs_nothing() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(std::clock() - before < CLOCKS_PER_SEC / 50);
}

static void child_gets_its_own_pool() {
  const int size = Pool::shared().size();
  const pid_t pid = fork();
  if (pid == 0) {
    CHECK(Pool::shared().size() == size);
    every_task_runs_once(50);
    _exit(0);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char** argv) {
  const bool with_fork = argc > 1 && !std::strcmp(argv[1], "fork");
  for (int threads : {1, 2, 5}) {
    Pool::shared().resize(threads);
    CHECK(Pool::shared().size() == threads);
    every_task_runs_once(2000);
    workers_are_exclusive();
    exceptions_propagate();
    nested_runs_are_inline();
    sleepers_wake();
    idle_costs_nothing();
    if (with_fork) child_gets_its_own_pool();
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back([] { every_task_runs_once(500); });
    for (std::thread& caller : callers) caller.join();
  }
  Pool::shared().resize(2);
  Pool::shared().run(4, [](int64_t, int) {});
  constexpr int kJobs = 20000;
  const auto begin = std::chrono::steady_clock::now();
  for (int job = 0; job < kJobs; ++job) Pool::shared().run(2, [](int64_t, int) {});
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
  std::printf("%.2f us per job of 2 threads\n", took.count() / kJobs);
}
