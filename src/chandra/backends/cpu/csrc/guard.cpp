// Files that shrink while they are mapped. To touch a page behind the new end raises SIGBUS, which ends the process. Here
// such pages of guarded files become zeros instead, and the guard knows that it has lost something; all other faults
// go to the handler that was there before.
#include <nanobind/nanobind.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>

namespace nb = nanobind;

namespace chandra {
namespace {

struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // begin is 0 where the entry is free
  std::atomic<bool> lost{false};
};

Range ranges[1024];  // a handler cannot wait for a lock, so entries do not move
uintptr_t page_mask;
struct sigaction before;
std::mutex registering;

void handle(int number, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Range& range : ranges) {
    const uintptr_t begin = range.begin, end = range.end, page = address & page_mask;
    if (begin == 0 || address < begin || address >= end) continue;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    if (mmap(reinterpret_cast<void*>(page), end - page, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) break;
    range.lost = true;
    return;  // and the instruction reads zeros
  }
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(number, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
  sigaction(SIGBUS, &before, nullptr);  // the instruction faults again
}

class Guard {
 public:
  explicit Guard(nb::handle file) {
    if (PyObject_GetBuffer(file.ptr(), &buffer_, PyBUF_SIMPLE)) throw nb::python_error();
    const std::lock_guard lock(registering);
    static const bool installed = install();
    for (Range& range : ranges) {
      if (!installed || range.begin != 0) continue;
      range_ = &range;
      range.lost = false;
      range.end = reinterpret_cast<uintptr_t>(buffer_.buf) + static_cast<uintptr_t>(buffer_.len);
      range.begin = reinterpret_cast<uintptr_t>(buffer_.buf);
      return;
    }
    PyBuffer_Release(&buffer_);
    throw std::runtime_error("too many files are guarded");
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  ~Guard() {
    range_->begin = 0;
    PyBuffer_Release(&buffer_);
  }
  bool lost() const { return range_->lost; }

 private:
  static bool install() {
    page_mask = ~(static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)) - 1);
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &before) == 0;
  }

  Py_buffer buffer_;
  Range* range_ = nullptr;
};

}  // namespace

void register_guard(nb::module_& m) {
  nb::class_<Guard>(m, "Guard", "Keeps the process alive if a mapped file shrinks while it is in use.")
      .def(nb::init<nb::handle>(), nb::arg("file"), "Of these bytes, all of a file. Raises RuntimeError.")
      .def_prop_ro("lost", &Guard::lost, "Whether some of them were touched after they had gone; they are zeros now.");
}

}  // namespace chandra
