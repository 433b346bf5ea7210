// Near copies among documents that share a bucket: best first, each against those that stay.

#pragma once

#include <unistd.h>

#include <algorithm>

#include "common.h"

namespace puyu {

// Signatures [rows, width], in memory or in a file: a file is read row by row, since few rows are ever asked for.
struct Signatures {
    const uint32_t *base;
    int32_t file;
    int64_t width;

    // Row i, or nullptr where the file cannot be read.
    const uint32_t *row(int64_t i, uint32_t *room) const {
        if (base) return base + i * width;
        int64_t size = width * 4, done = 0;
        while (done < size) {
            int64_t got = pread(file, reinterpret_cast<char *>(room) + done, size_t(size - done), i * size + done);
            if (got <= 0) return nullptr;
            done += got;
        }
        return room;
    }
};

struct NearTask {
    const int64_t *order;     // [count]: row of the p-th best
    const uint32_t *buckets;  // [bands, count]: bucket of the p-th best in each band, 0 where it is alone
    int64_t count, bands, num_buckets;
    double threshold;
    int64_t most;             // kept documents of a bucket that others are compared with
};

// Kept documents of each bucket, as chains in order of their places.
class Kept {
  public:
    explicit Kept(int64_t num_buckets) : chains(size_t(num_buckets + 1)) {}

    void add(uint32_t bucket, uint32_t place, int64_t most) {
        Chain &chain = chains[bucket];
        if (chain.size >= most) return;
        links.push_back({place, 0});
        uint32_t link = uint32_t(links.size());  // from 1 on
        if (chain.last) links[chain.last - 1].next = link;
        else chain.first = link;
        chain.last = link, chain.size++;
    }

    void collect(uint32_t bucket, std::vector<uint32_t> &places) const {
        for (uint32_t at = chains[bucket].first; at; at = links[at - 1].next) places.push_back(links[at - 1].place);
    }

  private:
    struct Chain {
        uint32_t first = 0, last = 0;
        int64_t size = 0;
    };
    struct Link {
        uint32_t place, next;
    };
    std::vector<Chain> chains;
    std::vector<Link> links;
};

// of [count]: the place of the one that stays instead, or -1; equal [count]: equal hashes with it. False: a file failed.
inline bool near_copies(const NearTask &task, const Signatures &signatures, int64_t *of, int32_t *equal) {
    Kept kept(task.num_buckets);
    std::vector<uint32_t> places, own(size_t(signatures.width)), other(size_t(signatures.width));
    for (int64_t p = 0; p < task.count; p++) {
        of[p] = -1, equal[p] = 0;
        places.clear();
        for (int64_t b = 0; b < task.bands; b++)
            if (uint32_t bucket = task.buckets[b * task.count + p]) kept.collect(bucket, places);
        std::sort(places.begin(), places.end());
        places.erase(std::unique(places.begin(), places.end()), places.end());
        const uint32_t *mine = places.empty() ? nullptr : signatures.row(task.order[p], own.data());
        if (!places.empty() && !mine) return false;
        int32_t best = -1;
        for (uint32_t place : places) {
            const uint32_t *row = signatures.row(task.order[place], other.data());
            if (!row) return false;
            int32_t same = 0;
            for (int64_t i = 0; i < signatures.width; i++) same += mine[i] == row[i];
            if (same > best) best = same, of[p] = place;
        }
        if (best >= 0 && double(best) / double(signatures.width) >= task.threshold) {
            equal[p] = best;
            continue;
        }
        of[p] = -1;
        for (int64_t b = 0; b < task.bands; b++)
            if (uint32_t bucket = task.buckets[b * task.count + p]) kept.add(bucket, uint32_t(p), task.most);
    }
    return true;
}

}  // namespace puyu
