// Fibers: stacks that take turns on one host thread.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

class Fiber {
public:
    // The stack that the program already runs on.
    Fiber() = default;

    // A stack of its own, on which `body` will run; it must not return.
    explicit Fiber(void (*body)()) : body_(body), stack_(allocate()), fresh_(true) {}

    Fiber(const Fiber&) = delete;

    ~Fiber() {
        if (body_) munmap(stack_ - guard_bytes(), guard_bytes() + STACK_BYTES);
    }

    // Leave `from`, which is running, until somebody changes back to it; go on with `to`.
    static void change(Fiber& from, Fiber& to) {
        from_ = &from;
        to_ = &to;
        start_change(&from.fake_stack_);
        if (_setjmp(from.context_) == 0) to.go_on();
        finish_change(from.fake_stack_);
    }

private:
    static constexpr size_t STACK_BYTES = 256 << 10;

    static size_t guard_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

    static char* allocate() {
        void* memory =
            mmap(nullptr, guard_bytes() + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, guard_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
        return static_cast<char*>(memory) + guard_bytes();
    }

    [[noreturn]] void go_on() {
        if (!fresh_) _longjmp(context_, 1);
        fresh_ = false;
        static ucontext_t start;  // static: a local one would leave its guards on the stack that is left here
        getcontext(&start);
        start.uc_stack.ss_sp = stack_;
        start.uc_stack.ss_size = STACK_BYTES;
        start.uc_link = nullptr;
        makecontext(&start, &Fiber::begin, 0);
        setcontext(&start);
        __builtin_unreachable();
    }

    static void begin() {
        finish_change(nullptr);
        to_->body_();
    }

#ifdef __SANITIZE_ADDRESS__
    static void start_change(void** fake_stack) { __sanitizer_start_switch_fiber(fake_stack, to_->stack_, to_->stack_bytes_); }
    static void finish_change(void* fake_stack) {
        const void* bottom = nullptr;
        size_t bytes = 0;
        __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
        if (from_->body_ == nullptr) {
            from_->stack_ = static_cast<char*>(const_cast<void*>(bottom));
            from_->stack_bytes_ = bytes;
        }
    }
#else
    static void start_change(void**) {}
    static void finish_change(void*) {}
#endif

    static inline Fiber* from_ = nullptr;
    static inline Fiber* to_ = nullptr;

    void (*body_)() = nullptr;
    char* stack_ = nullptr;
    size_t stack_bytes_ = STACK_BYTES;
    bool fresh_ = false;
    void* fake_stack_ = nullptr;
    jmp_buf context_;
};

}  // namespace emulation
