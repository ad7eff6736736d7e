// Output tiles of rows sorted into groups whose sizes only the device knows, in an order that lets the blocks of a persistent grid share
// L2.
#pragma once

#include <cstdint>

#include "device.h"
#include "warp.cuh"

namespace llama4_kernels {

struct GroupTile {
    int group;
    int first_row, end_row;  // end_row: of the group's rows, which may end inside the tile
    int column_tile;
};

// Tiles of ROWS rows by one column tile, numbered by group; in a group by bands of BAND row tiles; in a band by column and then by row. So
// blocks that run together read one band's rows again and again, and each column tile's weights once per band. Every tile costs the same,
// so that blocks that take every gridDim-th tile are balanced whatever the sizes of the groups.
template <int ROWS>
class GroupTiles {
public:
    // first_tile: shared memory of groups + 1 elements, for fill.
    __device__ GroupTiles(const int* offsets, int groups, int column_tiles, int* first_tile)
        : offsets_(offsets), groups_(groups), column_tiles_(column_tiles), first_tile_(first_tile) {}

    // By all lanes of one warp, before a barrier of the block.
    __device__ void fill() {
        const int lane = threadIdx.x % WARP;
        int before = 0;
        for (int start = 0; start < groups_; start += WARP) {
            const int group = start + lane;
            const int tiles = group < groups_ ? (offsets_[group + 1] - offsets_[group] + ROWS - 1) / ROWS : 0;
            const int through = inclusive_sum(tiles);
            if (group < groups_) first_tile_[group] = before + through - tiles;
            before += __shfl_sync(ALL_LANES, through, WARP - 1);
        }
        if (lane == 0) first_tile_[groups_] = before;
    }

    __device__ int64_t count() const { return int64_t(first_tile_[groups_]) * column_tiles_; }

    __device__ GroupTile operator[](int64_t index) const {
        const int row_tile = int(index / column_tiles_);
        int group = 0;
        for (int above = groups_; above - group > 1;) {  // not search.cuh's, with which ptxas spills in grouped_gemm
            const int middle = (group + above) / 2;
            (first_tile_[middle] <= row_tile ? group : above) = middle;
        }
        const int in_group = int(index - int64_t(first_tile_[group]) * column_tiles_);
        const int row_tiles = first_tile_[group + 1] - first_tile_[group];
        const int band = in_group / (BAND * column_tiles_);
        const int in_band = in_group - band * BAND * column_tiles_;
        const int height = min(BAND, row_tiles - band * BAND);
        const int first_row = offsets_[group] + (band * BAND + in_band % height) * ROWS;
        return {group, first_row, offsets_[group + 1], in_band / height};
    }

private:
    static constexpr int BAND = 16;

    const int* offsets_;
    int groups_, column_tiles_;
    int* first_tile_;
};

// Upper bound of the row tiles that `rows` rows in `groups` groups fall into.
inline int64_t most_row_tiles(int64_t rows, int64_t groups, int64_t tile) { return std::min(rows, rows / tile + groups); }

}  // namespace llama4_kernels
