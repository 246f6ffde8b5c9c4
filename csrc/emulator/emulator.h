// CUDA kernels on CPU threads: the names that a kernel uses (__global__, threadIdx, __syncthreads, warp
// shuffles), with bodies for a plain C++20 compiler, so that kernels run, are bounds-checked and race-checked
// without a GPU.
//
// Blocks run one after another, which is why __shared__ can be a function-level static. The threads of a
// block run in one of two ways:
//   sequential  as coroutines on one OS thread, switched at barriers: fast, and the same order every time
//   concurrent  as one OS thread each: what ThreadSanitizer needs to see races
//
// The record_* functions are called by the load and store helpers of csrc/common/vector.h. They note which
// bytes each thread block touches (see Traffic) and report misaligned accesses, which a GPU refuses.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#    include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)

namespace fused_ops::emulator {

struct Index3 {
    uint32_t x = 0, y = 0, z = 0;
};

enum class Mode { sequential, concurrent };

inline Mode mode = Mode::sequential;
inline int multiprocessors = 4;
// Whether blocks run in clusters, as on GPUs from compute capability 9.0 on.
inline bool clusters = true;
constexpr uint32_t WARP = 32;

// [begin, end) addresses.
using Interval = std::pair<uintptr_t, uintptr_t>;

// Sorts and joins; returns the number of distinct bytes.
inline uint64_t join_intervals(std::vector<Interval>& intervals) {
    std::sort(intervals.begin(), intervals.end());
    std::vector<Interval> joined;
    for (const Interval& interval : intervals) {
        if (!joined.empty() && interval.first <= joined.back().second) {
            joined.back().second = std::max(joined.back().second, interval.second);
        } else {
            joined.push_back(interval);
        }
    }
    intervals = std::move(joined);
    uint64_t bytes = 0;
    for (const Interval& interval : intervals) {
        bytes += interval.second - interval.first;
    }
    return bytes;
}

// What one launch moved; the figures are those of Traffic.
struct Launch {
    std::string name;
    uint64_t counted_bytes, block_bytes, requested_bytes;
};

// Global memory traffic since the last reset, reads and writes counted apart and then summed.
struct Traffic {
    uint64_t counted_bytes = 0;    // distinct bytes of each launch: what DRAM sees behind a perfect cache
    uint64_t block_bytes = 0;      // distinct bytes of each thread block: what L2 must deliver
    uint64_t requested_bytes = 0;  // everything asked for: what L1 must serve
    uint64_t launches = 0;
    uint64_t blocks = 0;
    // Of the last launch alone, so that a test can compare them with the tensors' extents.
    std::vector<Interval> read, written;
    std::vector<Launch> each;
};

inline Traffic traffic;

#if defined(__SANITIZE_THREAD__)
// While one lives, ThreadSanitizer takes neither order nor accesses from what the calling thread does.
struct HiddenFromThreadSanitizer {
    HiddenFromThreadSanitizer() {
        __tsan_ignore_thread_begin();
        AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    }
    ~HiddenFromThreadSanitizer() {
        AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
        __tsan_ignore_thread_end();
    }
};
// What a thread did before order_release(address) comes before what another does after
// order_acquire(address).
inline void order_release(void* address) {
    __tsan_release(address);
}
inline void order_acquire(void* address) {
    __tsan_acquire(address);
}
#else
struct HiddenFromThreadSanitizer {
    HiddenFromThreadSanitizer() {}
};
inline void order_release(void* /*address*/) {}
inline void order_acquire(void* /*address*/) {}
#endif

class Barrier {
  public:
    virtual ~Barrier() = default;
    virtual void wait() = 0;
    // The calling thread has ended: the others no longer wait for it.
    virtual void leave() = 0;
};

// For one OS thread per CUDA thread. ThreadSanitizer is told of the order that the barrier makes and not of
// its mutex: a thread that wakes up late takes the mutex after another has already come to the next barrier,
// and everything that the other did between the two would pass for ordered.
class ThreadBarrier : public Barrier {
  public:
    void reset(uint32_t count) {
        const HiddenFromThreadSanitizer hidden;
        std::lock_guard lock(mutex_);
        expected_ = count;
        arrived_ = 0;
    }
    void wait() override {
        // The generation does not change before this thread has arrived.
        char& order = order_[current_generation() % 2];
        order_release(&order);
        arrive_and_wait();
        order_acquire(&order);
    }
    void leave() override {
        const HiddenFromThreadSanitizer hidden;
        std::lock_guard lock(mutex_);
        --expected_;
        if (expected_ > 0 && arrived_ >= expected_) {
            open();
        }
    }

  private:
    uint64_t current_generation() {
        const HiddenFromThreadSanitizer hidden;
        return generation_;
    }
    void arrive_and_wait() {
        const HiddenFromThreadSanitizer hidden;
        std::unique_lock lock(mutex_);
        if (++arrived_ >= expected_) {
            open();
            return;
        }
        const uint64_t generation = generation_;
        condition_.wait(lock, [&] { return generation != generation_; });
    }
    void open() {
        arrived_ = 0;
        ++generation_;
        condition_.notify_all();
    }
    std::mutex mutex_;
    std::condition_variable condition_;
    uint32_t expected_ = 0, arrived_ = 0;
    uint64_t generation_ = 0;
    char order_[2] = {};  // one address per parity: no thread is two generations ahead of another
};

// For coroutines: waiting is giving way to the next one.
class CoroutineBarrier : public Barrier {
  public:
    explicit CoroutineBarrier(std::function<void()> give_way) : give_way_(std::move(give_way)) {}
    void reset(uint32_t count) {
        expected_ = count;
        arrived_ = 0;
    }
    void wait() override {
        ++progress;
        if (++arrived_ >= expected_) {
            open();
            return;
        }
        const uint64_t generation = generation_;
        while (generation == generation_) {
            give_way_();
        }
        ++progress;
    }
    void leave() override {
        ++progress;
        --expected_;
        if (expected_ > 0 && arrived_ >= expected_) {
            open();
        }
    }
    // Grows whenever any thread gets on; a round of coroutines without growth is a deadlock.
    static inline uint64_t progress = 0;

  private:
    void open() {
        arrived_ = 0;
        ++generation_;
    }
    std::function<void()> give_way_;
    uint32_t expected_ = 0, arrived_ = 0;
    uint64_t generation_ = 0;
};

// What a lane contributes to a product of its warp.
struct Words {
    uint32_t words[6];
};

// What the threads of the running block share.
struct Block {
    Barrier* barrier = nullptr;
    std::vector<Barrier*> warp_barriers;
    std::vector<uint64_t> exchange;  // one slot per thread, for shuffles
    std::vector<Words> fragments;    // the same, for products
    // Memory beyond the kernel's own, of exactly the size that the launch asked for.
    std::vector<float> dynamic_shared;
    uint32_t rank = 0;  // in its cluster
    std::vector<Block>* cluster = nullptr;
    Barrier* cluster_barrier = nullptr;
};

// What one CUDA thread has asked of global memory in the running block.
struct Requests {
    std::vector<Interval> read, written;
    uint64_t bytes = 0;
};

// A barrier of the block that every thread passes without waiting, counted from the block's first; negative:
// none. A test sets it to see that the barrier's absence is noticed.
inline int skipped_barrier = -1;

inline thread_local Block* block = nullptr;
// Of the running block; what FUSED_OPS_DYNAMIC_SHARED names.
inline thread_local float* dynamic_shared = nullptr;
inline thread_local int barriers_passed = 0;
inline thread_local Requests* requests = nullptr;
inline std::atomic<size_t> misaligned_bytes = 0;

inline void record(std::vector<Interval>& list, const void* address, size_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    if (begin % bytes != 0) {
        misaligned_bytes = bytes;
    }
    // Neighbouring accesses of one thread are one interval: it keeps the lists short.
    if (!list.empty() && list.back().second == begin) {
        list.back().second = begin + bytes;
    } else {
        list.emplace_back(begin, begin + bytes);
    }
    requests->bytes += bytes;
}

inline void record_read(const void* address, size_t bytes) {
    record(requests->read, address, bytes);
}

inline void record_write(const void* address, size_t bytes) {
    record(requests->written, address, bytes);
}

// Adds what the threads of a finished block asked for to the traffic, and empties their lists.
inline void finish_block(std::vector<Requests>& threads, std::vector<Interval>& launch_read,
                         std::vector<Interval>& launch_written) {
    std::vector<Interval> read, written;
    for (Requests& thread : threads) {
        read.insert(read.end(), thread.read.begin(), thread.read.end());
        written.insert(written.end(), thread.written.begin(), thread.written.end());
        traffic.requested_bytes += thread.bytes;
        thread.read.clear();
        thread.written.clear();
        thread.bytes = 0;
    }
    traffic.block_bytes += join_intervals(read) + join_intervals(written);
    traffic.blocks += 1;
    launch_read.insert(launch_read.end(), read.begin(), read.end());
    launch_written.insert(launch_written.end(), written.begin(), written.end());
}

}  // namespace fused_ops::emulator

inline thread_local fused_ops::emulator::Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace fused_ops::emulator {

// The blocks of one cluster at a time, which run together, with barriers of one of the two kinds.
template <typename SomeBarrier>
class Cluster {
  public:
    template <typename... Options>
    Cluster(uint32_t count, uint32_t block_threads, uint32_t shared_bytes, const Options&... options)
        : threads(count * block_threads),
          blocks_(count),
          block_threads_(block_threads),
          all_(std::make_unique<SomeBarrier>(options...)) {
        for (uint32_t rank = 0; rank < count; ++rank) {
            Block& one = blocks_[rank];
            one.rank = rank;
            one.cluster = &blocks_;
            one.cluster_barrier = all_.get();
            one.exchange.resize(block_threads);
            one.fragments.resize((block_threads + WARP - 1) / WARP * WARP);
            // NaN where nothing was written, so that a kernel that reads it shows.
            one.dynamic_shared.assign(shared_bytes / sizeof(float), std::nanf(""));
            barriers_.push_back(std::make_unique<SomeBarrier>(options...));
            one.barrier = barriers_.back().get();
            requests_.emplace_back(block_threads);
            for (uint32_t first = 0; first < block_threads; first += WARP) {
                barriers_.push_back(std::make_unique<SomeBarrier>(options...));
                one.warp_barriers.push_back(barriers_.back().get());
            }
        }
    }
    // Before the blocks from here on run.
    void reset() {
        all_->reset(threads);
        for (Block& one : blocks_) {
            static_cast<SomeBarrier*>(one.barrier)->reset(block_threads_);
            for (uint32_t warp = 0; warp < one.warp_barriers.size(); ++warp) {
                static_cast<SomeBarrier*>(one.warp_barriers[warp])
                    ->reset(std::min(WARP, block_threads_ - warp * WARP));
            }
        }
    }
    // The calling OS thread goes on as a CUDA thread, counted over the whole cluster.
    void enter(uint32_t thread, uint32_t first_block, uint32_t blocks) {
        const uint32_t rank = thread / block_threads_;
        block = &blocks_[rank];
        dynamic_shared = block->dynamic_shared.data();
        requests = &requests_[rank][thread % block_threads_];
        threadIdx = {thread % block_threads_, 0, 0};
        blockIdx = {first_block + rank, 0, 0};
        blockDim = {block_threads_, 1, 1};
        gridDim = {blocks, 1, 1};
    }
    void leave(uint32_t thread) {
        Block& one = blocks_[thread / block_threads_];
        one.warp_barriers[thread % block_threads_ / WARP]->leave();
        one.barrier->leave();
        all_->leave();
    }
    void finish(std::vector<Interval>& read, std::vector<Interval>& written) {
        for (std::vector<Requests>& of_block : requests_) {
            finish_block(of_block, read, written);
        }
    }
    const uint32_t threads;

  private:
    std::vector<Block> blocks_;
    const uint32_t block_threads_;
    std::unique_ptr<SomeBarrier> all_;
    std::vector<std::unique_ptr<SomeBarrier>> barriers_;
    std::vector<std::vector<Requests>> requests_;
};

// A kernel's launch: `cluster` neighbouring blocks run together and see each other's shared memory.
struct Grid {
    uint32_t blocks, threads, shared_bytes, cluster;
};

// Runs body() once per thread of every block, each thread an OS thread.
template <typename Body>
void run_concurrent(const Grid& grid, const Body& body, std::vector<Interval>& read,
                    std::vector<Interval>& written) {
    Cluster<ThreadBarrier> cluster(grid.cluster, grid.threads, grid.shared_bytes);
    ThreadBarrier round;
    cluster.reset();
    round.reset(cluster.threads);
    std::vector<std::thread> pool;
    for (uint32_t thread = 0; thread < cluster.threads; ++thread) {
        pool.emplace_back([&, thread] {
            for (uint32_t index = 0; index < grid.blocks; index += grid.cluster) {
                cluster.enter(thread, index, grid.blocks);
                barriers_passed = 0;
                body();
                cluster.leave(thread);
                round.wait();
                if (thread == 0) {
                    cluster.finish(read, written);
                    cluster.reset();
                }
                round.wait();
            }
        });
    }
    for (std::thread& thread : pool) {
        thread.join();
    }
}

// The coroutines of run_sequential: one per CUDA thread, kept from launch to launch for their stacks.
class Coroutines {
  public:
    // Returns false where the threads wait for each other for ever.
    bool run(uint32_t threads, const std::function<void(uint32_t)>& enter, const std::function<void()>& body,
             const std::function<void(uint32_t)>& leave) {
        while (all_.size() < threads) {
            all_.push_back(std::make_unique<Coroutine>());
        }
        body_ = &body;
        leave_ = &leave;
        for (uint32_t thread = 0; thread < threads; ++thread) {
            Coroutine& coroutine = *all_[thread];
            coroutine.done = false;
            getcontext(&coroutine.context);
            coroutine.context.uc_stack.ss_sp = coroutine.stack.get();
            coroutine.context.uc_stack.ss_size = STACK_BYTES;
            coroutine.context.uc_link = &scheduler_;
            makecontext(&coroutine.context, &Coroutines::main, 0);
        }
        for (uint32_t live = threads; live > 0;) {
            const uint64_t progress = CoroutineBarrier::progress;
            for (uint32_t thread = 0; thread < threads; ++thread) {
                if (!all_[thread]->done) {
                    current_ = thread;
                    enter(thread);
                    running_ = this;
                    swapcontext(&scheduler_, &all_[thread]->context);
                    live -= all_[thread]->done ? 1 : 0;
                }
            }
            if (live > 0 && progress == CoroutineBarrier::progress) {
                return false;
            }
        }
        return true;
    }
    void give_way() { swapcontext(&all_[current_]->context, &scheduler_); }

  private:
    static constexpr size_t STACK_BYTES = 256 * 1024;
    struct Coroutine {
        ucontext_t context;
        std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
        bool done = false;
    };
    static void main() {
        Coroutines& self = *running_;
        (*self.body_)();
        const uint32_t thread = self.current_;
        (*self.leave_)(thread);
        self.all_[thread]->done = true;
    }
    static inline Coroutines* running_ = nullptr;
    std::vector<std::unique_ptr<Coroutine>> all_;
    ucontext_t scheduler_;
    const std::function<void()>* body_ = nullptr;
    const std::function<void(uint32_t)>* leave_ = nullptr;
    uint32_t current_ = 0;
};

inline Coroutines coroutines;

// Runs body() once per thread of every block, all on the calling OS thread. Returns false for a deadlock.
template <typename Body>
bool run_sequential(const Grid& grid, const Body& body, std::vector<Interval>& read,
                    std::vector<Interval>& written) {
    const std::function<void()> give_way = [] { coroutines.give_way(); };
    Cluster<CoroutineBarrier> cluster(grid.cluster, grid.threads, grid.shared_bytes, give_way);
    bool finished = true;
    for (uint32_t index = 0; index < grid.blocks && finished; index += grid.cluster) {
        cluster.reset();
        finished = coroutines.run(
            cluster.threads, [&](uint32_t thread) { cluster.enter(thread, index, grid.blocks); }, body,
            [&](uint32_t thread) { cluster.leave(thread); });
        cluster.finish(read, written);
    }
    block = nullptr;
    requests = nullptr;
    return finished;
}

// Runs a kernel, called `name` in the record of launches; returns null, or what a GPU would have stopped at.
template <typename Body>
const char* launch(const char* name, const Grid& grid, const Body& body) {
    static std::mutex one_at_a_time;
    static std::string fault;
    std::lock_guard lock(one_at_a_time);
    std::vector<Interval> read, written;
    const struct {
        uint64_t block_bytes, requested_bytes;
    } before{traffic.block_bytes, traffic.requested_bytes};
    misaligned_bytes = 0;
    bool finished = true;
    if (mode == Mode::concurrent) {
        run_concurrent(grid, body, read, written);
    } else {
        finished = run_sequential(grid, body, read, written);
    }
    const uint64_t counted_bytes = join_intervals(read) + join_intervals(written);
    traffic.counted_bytes += counted_bytes;
    traffic.launches += 1;
    traffic.each.push_back({name, counted_bytes, traffic.block_bytes - before.block_bytes,
                            traffic.requested_bytes - before.requested_bytes});
    traffic.read = std::move(read);
    traffic.written = std::move(written);
    if (!finished) {
        return "deadlock: not every thread reaches the same barrier";
    }
    if (misaligned_bytes != 0) {
        fault = "misaligned access of " + std::to_string(misaligned_bytes) + " bytes";
        return fault.c_str();
    }
    return nullptr;
}

template <typename Body>
const char* launch(const char* name, uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
                   const Body& body) {
    return launch(name, Grid{blocks, threads, shared_bytes, 1}, body);
}

// The value that `lane` of the calling thread's warp passes in the same call.
template <typename T>
T exchange(T value, uint32_t lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Block& shared = *block;
    Barrier& warp = *shared.warp_barriers[threadIdx.x / WARP];
    const uint32_t first = threadIdx.x / WARP * WARP;
    std::memcpy(&shared.exchange[threadIdx.x], &value, sizeof(T));
    warp.wait();
    T result;
    std::memcpy(&result, &shared.exchange[std::min<size_t>(first + lane, shared.exchange.size() - 1)],
                sizeof(T));
    warp.wait();
    return result;
}

// What every lane of the calling thread's warp passes in the same call.
inline void gather(const Words& mine, Words (&all)[WARP]) {
    Block& shared = *block;
    Barrier& warp = *shared.warp_barriers[threadIdx.x / WARP];
    shared.fragments[threadIdx.x] = mine;
    warp.wait();
    std::copy_n(shared.fragments.begin() + threadIdx.x / WARP * WARP, WARP, all);
    warp.wait();
}

}  // namespace fused_ops::emulator

namespace fused_ops::emulator {

inline void pass(Barrier& barrier) {
    if (mode != Mode::concurrent || barriers_passed++ != skipped_barrier) {
        barrier.wait();
    }
}

}  // namespace fused_ops::emulator

inline void __syncthreads() {
    fused_ops::emulator::pass(*fused_ops::emulator::block->barrier);
}

inline void __syncwarp(uint32_t /*mask*/ = 0xffffffffu) {
    fused_ops::emulator::block->warp_barriers[threadIdx.x / fused_ops::emulator::WARP]->wait();
}

template <typename T>
T __shfl_sync(uint32_t /*mask*/, T value, int lane) {
    return fused_ops::emulator::exchange(value, static_cast<uint32_t>(lane) % fused_ops::emulator::WARP);
}

template <typename T>
T __shfl_down_sync(uint32_t /*mask*/, T value, uint32_t delta) {
    const uint32_t lane = threadIdx.x % fused_ops::emulator::WARP;
    const uint32_t source = lane + delta < fused_ops::emulator::WARP ? lane + delta : lane;
    return fused_ops::emulator::exchange(value, source);
}

template <typename T>
T __shfl_xor_sync(uint32_t /*mask*/, T value, uint32_t lanes) {
    return fused_ops::emulator::exchange(value, (threadIdx.x ^ lanes) % fused_ops::emulator::WARP);
}
