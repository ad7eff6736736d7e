// Who multiplies which stages. The stages of all tiles, one tile after the other, are cut into runs of equal length, one per block,
// wherever tiles end ("stream-K"): a stage is as many bytes of weights as any other, so every block reads the same from memory, and no last
// round is half empty. Blocks whose runs meet in a tile add up their sums there (combine_pieces in moe_tile.cuh). Where there are many
// tiles for every block, each takes whole ones in turn: neighbours then run at the same time and share what L2 holds.
#pragma once

#include "device.h"
#include "moe.h"

namespace llama4_kernels {

__host__ __device__ constexpr bool whole_tiles(int64_t tiles, int blocks) { return tiles >= MOE_MANY_ROUNDS * blocks; }

// Stages cut into runs that differ by one at most, the longer ones first. Where tiles are shared they are few, and their stages an int.
struct StageRuns {
    int length;
    int blocks;  // that have a run
    int longer;  // of them, by one stage

    __host__ __device__ static StageRuns of(int stages, int grid) {
        const int blocks = min(grid, ceil_div(stages, MOE_MIN_RUN)), length = stages / blocks;
        return {length, blocks, stages - length * blocks};
    }

    // The first stage of a block's run, and so the end of the one before; of blocks without a run, the end of all.
    __host__ __device__ int begin(int block) const { return min(block, blocks) * length + min(block, longer); }
};

// Stages `begin` to `end` of a tile, counted within it.
struct Piece {
    int tile, begin, end;
};

// What this block does, in shared memory. Tiles: count(), and of tile i steps(i); where tiles are shared, also stages(), tile_of(stage) and
// first_stage(i), of all stages.
struct Work {
    bool whole;
    int first_tile, end_tile, tile_stride;
    StageRuns runs;
    int begin, end;  // this block's run

    // By one thread, before a barrier of the block.
    template <class Tiles>
    __device__ void plan(const Tiles& tiles) {
        whole = whole_tiles(tiles.count(), gridDim.x);
        if (whole) {
            first_tile = blockIdx.x;
            end_tile = tiles.count();
            tile_stride = gridDim.x;
            return;
        }
        runs = StageRuns::of(tiles.stages(), gridDim.x);
        begin = runs.begin(blockIdx.x);
        end = runs.begin(blockIdx.x + 1);
        first_tile = begin < end ? tiles.tile_of(begin) : 0;
        end_tile = begin < end ? tiles.tile_of(end - 1) + 1 : 0;
        tile_stride = 1;
    }

    template <class Tiles, class Visit>
    __device__ void for_each_piece(const Tiles& tiles, Visit visit) const {
        for (int tile = first_tile; tile < end_tile; tile += tile_stride) visit(piece_of(tiles, tile));
    }

    template <class Tiles, class Visit>
    __device__ void for_first_piece(const Tiles& tiles, Visit visit) const {
        if (first_tile < end_tile) visit(piece_of(tiles, first_tile));
    }

private:
    template <class Tiles>
    __device__ Piece piece_of(const Tiles& tiles, int tile) const {
        Piece piece{tile, 0, tiles.steps(tile)};
        if (whole) return piece;
        const int first_stage = tiles.first_stage(tile);
        piece.begin = max(begin - first_stage, 0);
        piece.end = min(end - first_stage, piece.end);
        return piece;
    }
};

}  // namespace llama4_kernels
