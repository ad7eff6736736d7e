// Host twin of hopper/tma.cuh, hopper/cp_async.cuh and hopper/remote_store.cuh.
//
// The bytes that a copy will write hold NaN until it is complete. Loads complete in any order, when no thread can go on without them;
// cp.async when its thread waits for it, or as late as a load where it is to arrive at an mbarrier; stores read shared memory when their
// thread waits for that, and write global memory when it waits for all.
#pragma once

#include "emulation/barrier.h"
#include "emulation/cluster.h"
#include "hopper/tensor_map.h"

namespace emulation {

using llama4_kernels::hopper::Swizzle;

struct TensorMap {
    const char* name;
    uint8_t* data;
    int rank;
    unsigned element_bytes;
    std::array<uint64_t, 4> sizes;
    std::array<uint64_t, 4> strides;  // in bytes; [0] is the element's size
    std::array<uint32_t, 4> box;
    Swizzle swizzle;

    size_t row_bytes() const { return size_t(box[0]) * element_bytes; }
    size_t box_bytes() const { return row_bytes() * box[1] * box[2] * box[3]; }
};

inline void check_aligned(const void* pointer, size_t alignment, Site site, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return;
    scheduler().fail(site, std::string("misaligned copy: ") + what + " is not a multiple of " + std::to_string(alignment));
}

// The block whose shared memory holds all of the bytes.
inline Block& shared_range(const void* pointer, size_t bytes, Site site, const char* what) {
    Block& block = scheduler().owner(pointer, site, what);
    if (block.address(pointer) - FIRST_SHARED_ADDRESS + bytes > block.shared_bytes) {
        scheduler().fail(site, std::string("out of bounds: ") + what + " and its " + std::to_string(bytes) + " bytes exceed the block's " +
                                   std::to_string(block.shared_bytes) + " bytes of shared memory");
    }
    return block;
}

void check_no_product_reads(Block& block, uint32_t address, size_t bytes, Site site);

// Shared memory that a copy is about to write: not that of another copy, nor of a product under way. Poisons it.
inline void take_over(Block& block, void* to, size_t bytes, Site site) {
    const uint32_t address = block.address(to);
    if (block.is_owned(address, bytes)) scheduler().fail(site, "a copy to shared memory that another copy under way writes or reads");
    check_no_product_reads(block, address, bytes, site);
    block.own(address, bytes, Owner::written);
    block.write(address, nullptr, bytes);
}

inline void begin_load(void* to, size_t bytes, const void* barrier, Site site, std::function<void(Block&, uint32_t)> write) {
    Block& block = shared_range(to, bytes, site, "the destination");
    if (!memory_barrier(barrier, site).visible)
        scheduler().fail(site, "the mbarrier was not made visible to copies: fence_barrier_init is missing");
    take_over(block, to, bytes, site);
    const uint32_t address = block.address(to);
    const auto complete = [&block, address, bytes, barrier, site, write = std::move(write)] {
        write(block, address);
        block.own(address, bytes, Owner::nobody);
        complete_bytes(barrier, bytes, site);
    };
    scheduler().loads.push_back({complete, &block, site});
}

// Calls row(offset in the box, first byte in the tensor or null, bytes within bounds, bytes out of bounds before them) for each row of a
// box.
template <class Row>
void for_each_row(const TensorMap& map, const std::array<int64_t, 4>& at, Row row) {
    const int64_t begin = std::clamp<int64_t>(at[0], 0, int64_t(map.sizes[0])),
                  end = std::clamp<int64_t>(at[0] + map.box[0], 0, int64_t(map.sizes[0]));
    size_t offset = 0;
    for (uint32_t l = 0; l < map.box[3]; ++l) {
        for (uint32_t k = 0; k < map.box[2]; ++k) {
            for (uint32_t j = 0; j < map.box[1]; ++j, offset += map.row_bytes()) {
                const std::array<int64_t, 4> first{begin, at[1] + j, at[2] + k, at[3] + l};
                uint8_t* from = map.data;
                bool inside = begin < end;
                for (int i = 0; i < 4; ++i) {
                    inside = inside && first[i] >= 0 && first[i] < int64_t(map.sizes[i]);
                    from += first[i] * int64_t(map.strides[i]);
                }
                row(offset, from, inside ? size_t(end - begin) * map.element_bytes : 0, size_t(begin - at[0]) * map.element_bytes);
            }
        }
    }
}

inline size_t alignment(const TensorMap& map) {
    return map.swizzle == Swizzle::none ? 128 : 8 * size_t(llama4_kernels::hopper::span_bytes(map.swizzle));
}

inline void load_box(const TensorMap& map, const std::array<int64_t, 4>& at, Block& block, uint32_t to) {
    std::vector<uint8_t> bytes(map.row_bytes());
    for_each_row(map, at, [&](size_t offset, const uint8_t* from, size_t inside, size_t before) {
        std::fill(bytes.begin(), bytes.end(), uint8_t(0));
        if (inside) std::memcpy(bytes.data() + before, from, inside);
        for (size_t chunk = 0; chunk < bytes.size(); chunk += 16) {
            block.write(llama4_kernels::hopper::swizzled(map.swizzle, uint32_t(to + offset + chunk)), bytes.data() + chunk, 16);
        }
    });
}

// Read a box from shared memory, in the order of the tensor.
inline std::vector<uint8_t> read_box(const TensorMap& map, const Block& block, uint32_t from) {
    std::vector<uint8_t> bytes(map.box_bytes());
    for (size_t chunk = 0; chunk < bytes.size(); chunk += 16) {
        const uint32_t address = llama4_kernels::hopper::swizzled(map.swizzle, uint32_t(from + chunk));
        std::memcpy(bytes.data() + chunk, block.shared.get() + (address - FIRST_SHARED_ADDRESS), 16);
    }
    return bytes;
}

inline void begin_store(const void* from, size_t bytes, Site site, std::function<std::vector<uint8_t>()> read,
                        std::function<void(const uint8_t*)> write) {
    Block& block = shared_range(from, bytes, site, "the source");
    auto taken = std::make_shared<std::vector<uint8_t>>();
    const auto check_and_read = [&block, from, bytes, site, taken, read = std::move(read)] {
        if (!block.is_fenced(from, bytes))
            scheduler().fail(site, "the store reads plain writes to shared memory without a fence_async_proxy after them");
        *taken = read();
        block.own(block.address(from), bytes, Owner::nobody);
    };
    block.own(block.address(from), bytes, Owner::read);
    current().open_stores.push_back({check_and_read, [taken, write = std::move(write)] { write(taken->data()); }});
}

template <class... Coordinates>
std::array<int64_t, 4> coordinates_of(const TensorMap& map, Site site, Coordinates... coordinates) {
    static_assert(sizeof...(coordinates) >= 2 && sizeof...(coordinates) <= 4);
    if (map.rank != int(sizeof...(coordinates))) scheduler().fail(site, "coordinates for a tensor map of another rank");
    std::array<int64_t, 4> at{};
    int i = 0;
    for (const int coordinate : {int(coordinates)...}) at[i++] = coordinate;
    if (at[0] * map.element_bytes % 16) scheduler().fail(site, "misaligned copy: coordinate 0 is not a multiple of 16 bytes");
    return at;
}

inline void commit(TransferGroup& open, std::deque<TransferGroup>& groups) { groups.push_back(std::exchange(open, {})); }

inline void complete_copies(Thread& thread, size_t pending) {
    for (; thread.copies.size() > pending; thread.copies.pop_front(), ++thread.copy_groups_completed) {
        for (const Transfer& copy : thread.copies.front()) copy.read();
    }
}

inline void read_stores(Thread& thread, size_t pending) {
    for (; thread.stores.size() > pending; thread.stores.pop_front()) {
        for (const Transfer& store : thread.stores.front()) store.read();
        thread.unwritten_stores.push_back(thread.stores.front());
    }
}

}  // namespace emulation

namespace llama4_kernels::hopper {

using emulation::TensorMap;

template <int RANK>
TensorMap make_tensor_map(const TensorShape<RANK>& shape) {
    check(shape);
    TensorMap map{
        shape.name,   static_cast<uint8_t*>(const_cast<void*>(shape.data)), RANK, element_bytes(shape.type), {1, 1, 1, 1}, {}, {1, 1, 1, 1},
        shape.swizzle};
    std::copy(shape.sizes.begin(), shape.sizes.end(), map.sizes.begin());
    std::copy(shape.strides.begin(), shape.strides.end(), map.strides.begin() + 1);
    std::copy(shape.box.begin(), shape.box.end(), map.box.begin());
    map.strides[0] = map.element_bytes;
    return map;
}

inline void prefetch_tensor_map(const TensorMap&) {}

// The call's own place is taken where the barrier is handed over, since a parameter pack leaves no room for a default argument.
struct BarrierAt {
    BarrierAt(Barrier& barrier, Site site = Site::here()) : barrier(barrier), site(site) {}
    Barrier& barrier;
    Site site;
};

struct TensorMapAt {
    TensorMapAt(const TensorMap& map, Site site = Site::here()) : map(map), site(site) {}
    const TensorMap& map;
    Site site;
};

template <L2 HINT = L2::normal, class... Coordinates>
void tma_load_multicast(void* to, const TensorMap& map, BarrierAt barrier, uint16_t blocks, Coordinates... coordinates) {
    const auto at = emulation::coordinates_of(map, barrier.site, coordinates...);
    emulation::check_aligned(to, emulation::alignment(map), barrier.site, "the destination");
    if (blocks == 0 || blocks >> emulation::scheduler().blocks())
        emulation::scheduler().fail(barrier.site, "a copy to blocks that the cluster of " +
                                                      std::to_string(emulation::scheduler().blocks()) + " does not have");
    for (unsigned rank = 0; rank < emulation::scheduler().blocks(); ++rank) {
        if ((blocks >> rank & 1) == 0) continue;
        emulation::peer(rank, barrier.site, "a copy to");
        emulation::begin_load(remote_shared(static_cast<uint8_t*>(to), rank, barrier.site), map.box_bytes(),
                              remote_shared(&barrier.barrier, rank, barrier.site), barrier.site,
                              [map, at](emulation::Block& block, uint32_t address) { emulation::load_box(map, at, block, address); });
    }
}

template <L2 HINT = L2::normal, class... Coordinates>
void tma_load(void* to, const TensorMap& map, BarrierAt barrier, Coordinates... coordinates) {
    const auto at = emulation::coordinates_of(map, barrier.site, coordinates...);
    emulation::check_aligned(to, emulation::alignment(map), barrier.site, "the destination");
    emulation::begin_load(to, map.box_bytes(), &barrier.barrier, barrier.site,
                          [map, at](emulation::Block& block, uint32_t address) { emulation::load_box(map, at, block, address); });
}

// Without an owner meanwhile: its 8 bytes share their chunk with other stores.
template <class T>
void store_async(T* local, unsigned rank, T value, BarrierAt barrier) {
    const emulation::Site site = barrier.site;
    T* to = remote_shared(local, rank, site);
    const Barrier* counter = remote_shared(&barrier.barrier, rank, site);
    emulation::check_aligned(to, 8, site, "the destination");
    if (!emulation::memory_barrier(counter, site).visible)
        emulation::scheduler().fail(site, "the mbarrier was not made visible to the cluster: fence_barrier_init is missing");
    emulation::Block& block = emulation::shared_range(to, sizeof value, site, "the destination");
    block.write(block.address(to), nullptr, sizeof value);
    const auto complete = [&block, to, value, counter, site] {
        block.write(block.address(to), &value, sizeof value);
        emulation::complete_bytes(counter, sizeof value, site);
    };
    emulation::scheduler().loads.push_back({complete, &block, site});
}

template <class... Coordinates>
void tma_prefetch(TensorMapAt map, Coordinates... coordinates) {
    emulation::coordinates_of(map.map, map.site, coordinates...);
}

template <class... Coordinates>
void tma_store(TensorMapAt map_at, const void* from, Coordinates... coordinates) {
    const TensorMap map = map_at.map;
    const auto at = emulation::coordinates_of(map, map_at.site, coordinates...);
    if (std::any_of(at.begin(), at.end(), [](int64_t coordinate) { return coordinate < 0; }))
        emulation::scheduler().fail(map_at.site, "a store with a negative coordinate");
    emulation::check_aligned(from, emulation::alignment(map), map_at.site, "the source");
    emulation::Block& block = *emulation::current().block;
    emulation::begin_store(
        from, map.box_bytes(), map_at.site, [&block, map, from] { return emulation::read_box(map, block, block.address(from)); },
        [map, at](const uint8_t* bytes) {
            emulation::for_each_row(map, at, [&](size_t offset, uint8_t* to, size_t inside, size_t before) {
                if (inside) std::memcpy(to, bytes + offset + before, inside);
            });
        });
}

template <L2 HINT = L2::normal>
void bulk_load(void* to, const void* from, unsigned bytes, BarrierAt barrier) {
    emulation::check_aligned(to, 16, barrier.site, "the destination");
    emulation::check_aligned(from, 16, barrier.site, "the source");
    emulation::check_aligned(reinterpret_cast<const void*>(uintptr_t(bytes)), 16, barrier.site, "the number of bytes");
    emulation::begin_load(to, bytes, &barrier.barrier, barrier.site,
                          [from, bytes](emulation::Block& block, uint32_t address) { block.write(address, from, bytes); });
}

inline void bulk_prefetch(const void* from, unsigned bytes, Site site = Site::here()) {
    emulation::check_aligned(from, 16, site, "the source");
    emulation::check_aligned(reinterpret_cast<const void*>(uintptr_t(bytes)), 16, site, "the number of bytes");
}

inline void bulk_commit() { emulation::commit(emulation::current().open_stores, emulation::current().stores); }

template <int PENDING>
void bulk_wait() {
    emulation::Thread& thread = emulation::current();
    emulation::read_stores(thread, PENDING);
    for (const size_t keep = PENDING - thread.stores.size(); thread.unwritten_stores.size() > keep; thread.unwritten_stores.pop_front()) {
        for (const emulation::Transfer& store : thread.unwritten_stores.front()) store.write();
    }
}

inline void cp_async_16(void* to, const void* from, bool valid = true, Site site = Site::here()) {
    emulation::check_aligned(to, 16, site, "the destination");
    if (valid) emulation::check_aligned(from, 16, site, "the source");
    emulation::Block& block = emulation::shared_range(to, 16, site, "the destination");
    emulation::take_over(block, to, 16, site);
    emulation::Thread& thread = emulation::current();
    const auto copy = [&block, &thread, to, from, valid] {
        valid ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
        block.own(block.address(to), 16, emulation::Owner::nobody);
        block.note_copy(block.address(to), thread);
    };
    thread.open_copies.push_back({copy, [] {}});
}

inline void cp_async_commit() { emulation::commit(emulation::current().open_copies, emulation::current().copies); }

template <int PENDING>
void cp_async_wait() {
    emulation::complete_copies(emulation::current(), PENDING);
}

inline void cp_async_arrive(BarrierAt barrier) {
    cp_async_commit();
    emulation::Thread& thread = emulation::current();
    const uint64_t end = thread.copy_groups_completed + thread.copies.size();
    const auto complete = [&thread, end, barrier] {
        const uint64_t last = thread.copy_groups_completed + thread.copies.size();
        emulation::complete_copies(thread, size_t(last - std::min(last, end)));
        emulation::arrive(&barrier.barrier, barrier.site);
    };
    emulation::scheduler().loads.push_back({complete, thread.block, barrier.site});
}

inline void fence_async_proxy() { emulation::current().last_fence = ++emulation::current().block->proxy_fences; }

}  // namespace llama4_kernels::hopper

#include "emulation/wgmma.h"  // defines check_no_product_reads
