// Threads that share one loop at a time. They sleep between loops: nothing spins. A loop ends when every thread has ended
// its part, so none can take from the next one by mistake.
#pragma once
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace ferry {

class Pool {
  public:
    explicit Pool(int num_threads) {
        try {
            for (int i = 1; i < num_threads; i++) threads_.emplace_back([this] { work(); });
        } catch (...) {
            end();
            throw;
        }
    }

    ~Pool() { end(); }

    // Call body(i) for i in 0..count-1, on all threads, and return when all are done. What a call throws is thrown here,
    // once nobody works any more; the calls that have not begun then are left out.
    void run(long count, const std::function<void(long)>& body) {
        if (threads_.empty() || count < 2) {
            for (long i = 0; i < count; i++) body(i);
            return;
        }
        {
            std::lock_guard<std::mutex> hold(mutex_);
            body_ = &body;
            count_ = count;
            next_ = 0;
            busy_ = threads_.size();
            round_++;
        }
        wake_.notify_all();
        take();
        std::unique_lock<std::mutex> hold(mutex_);
        done_.wait(hold, [this] { return busy_ == 0; });
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    long size() const { return (long)threads_.size() + 1; }

  private:
    void take() {
        try {
            for (long i = next_++; i < count_; i = next_++) (*body_)(i);
        } catch (...) {
            std::lock_guard<std::mutex> hold(mutex_);
            if (!error_) error_ = std::current_exception();
            next_ = count_;
        }
    }

    void end() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            ending_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    void work() {
        long seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> hold(mutex_);
                wake_.wait(hold, [&] { return ending_ || round_ != seen; });
                if (ending_) return;
                seen = round_;
            }
            take();
            std::lock_guard<std::mutex> hold(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(long)>* body_ = nullptr;
    long count_ = 0, round_ = 0;
    std::atomic<long> next_{0};
    std::exception_ptr error_;
    size_t busy_ = 0;
    bool ending_ = false;
};

}  // namespace ferry
