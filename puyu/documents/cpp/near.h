// Near copies among documents that share a bucket: best first, each against those that stay.

#pragma once

#include <unistd.h>

#include <algorithm>

#include "common.h"

namespace puyu {

// A column of numbers, in memory or in a file: a file is read row by row, since few rows are ever asked for.
struct Values {
    const uint32_t *base;
    int32_t file;

    // `count` of them from place `from` on, or nullptr where the file cannot be read.
    const uint32_t *read(int64_t from, int64_t count, std::vector<uint32_t> &room) const {
        if (base) return base + from;
        if (int64_t(room.size()) < count + 1) room.resize(size_t(count + 1));
        int64_t size = count * 4, done = 0;
        while (done < size) {
            int64_t got = pread(file, reinterpret_cast<char *>(room.data()) + done, size_t(size - done), from * 4 + done);
            if (got <= 0) return nullptr;
            done += got;
        }
        return room.data();
    }
};

struct NearTask {
    const int64_t *order;     // [count]: row of the p-th best
    const uint32_t *buckets;  // [bands, count]: bucket of the p-th best in each band, 0 where it is alone
    const int64_t *shingles;  // [rows]: how many each has, also equal ones
    const int64_t *starts;    // [rows + 1]: where the sketch of a row begins
    int64_t count, bands, num_buckets;
    int64_t width;            // hashes of a signature
    int64_t sketch;           // a sketch with fewer shingles than that holds all; 0: there are no sketches
    double threshold, doubt;  // an estimate that is nearer to the threshold than that is not believed
    int64_t most;             // kept documents of a bucket that others are compared with
};

// Jaccard similarity of two sets by their smallest hashes, in order: exact where both sketches hold all of their sets,
// else by what is smaller than the end of those that do not (bottom-k sketches; Cohen and Kaplan, 2007).
inline double similarity(const uint32_t *a, int64_t size_a, bool all_a, const uint32_t *b, int64_t size_b, bool all_b) {
    uint64_t limit = uint64_t(1) << 32;
    if (!all_a && size_a) limit = a[size_a - 1];
    if (!all_b && size_b && b[size_b - 1] < limit) limit = b[size_b - 1];
    int64_t both = 0, either = 0, i = 0, k = 0;
    while (true) {
        bool more_a = i < size_a && a[i] <= limit, more_b = k < size_b && b[k] <= limit;
        if (!more_a && !more_b) break;
        either++;
        if (more_a && more_b && a[i] == b[k]) both++, i++, k++;
        else if (more_a && (!more_b || a[i] < b[k])) i++;
        else k++;
    }
    return either ? double(both) / double(either) : 0.0;
}

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

class Near {
  public:
    Near(const NearTask &task, const Values &signatures, const Values &sketches)
        : task(task), signatures(signatures), sketches(sketches), kept(task.num_buckets) {}

    // of [count]: the place of the one that stays instead, or -1; value [count]: how alike they are. False: a file failed.
    bool operator()(int64_t *of, double *value) {
        for (int64_t p = 0; p < task.count; p++) {
            of[p] = -1, value[p] = 0;
            if (!collect(p) || !choose(p, of[p], value[p])) return false;
            if (of[p] >= 0) continue;
            for (int64_t b = 0; b < task.bands; b++)
                if (uint32_t bucket = task.buckets[b * task.count + p]) kept.add(bucket, uint32_t(p), task.most);
        }
        return true;
    }

  private:
    struct Candidate {
        int32_t equal;  // hashes
        uint32_t place;
        bool operator<(const Candidate &other) const {
            return equal != other.equal ? equal > other.equal : place < other.place;
        }
    };
    const NearTask &task;
    const Values &signatures, &sketches;
    Kept kept;
    std::vector<uint32_t> places, own, other;
    std::vector<Candidate> candidates;

    // The kept documents that share a bucket with p, the most similar first.
    bool collect(int64_t p) {
        places.clear(), candidates.clear();
        for (int64_t b = 0; b < task.bands; b++)
            if (uint32_t bucket = task.buckets[b * task.count + p]) kept.collect(bucket, places);
        if (places.empty()) return true;
        std::sort(places.begin(), places.end());
        places.erase(std::unique(places.begin(), places.end()), places.end());
        const uint32_t *mine = signatures.read(task.order[p] * task.width, task.width, own);
        if (!mine) return false;
        for (uint32_t place : places) {
            const uint32_t *row = signatures.read(task.order[place] * task.width, task.width, other);
            if (!row) return false;
            int32_t equal = 0;
            for (int64_t i = 0; i < task.width; i++) equal += mine[i] == row[i];
            candidates.push_back({equal, place});
        }
        std::sort(candidates.begin(), candidates.end());
        return true;
    }

    // The first candidate that is similar enough.
    bool choose(int64_t p, int64_t &of, double &value) {
        double doubt = task.sketch ? task.doubt : 0.0;
        for (const Candidate &candidate : candidates) {
            double alike = double(candidate.equal) / double(task.width);
            if (alike < task.threshold - doubt) return true;
            if (alike < task.threshold + doubt && task.sketch && !compare(p, candidate.place, alike)) return false;
            if (alike >= task.threshold) {
                of = candidate.place, value = alike;
                return true;
            }
        }
        return true;
    }

    bool compare(int64_t p, int64_t place, double &alike) {
        int64_t a = task.order[p], b = task.order[place];
        int64_t size_a = task.starts[a + 1] - task.starts[a], size_b = task.starts[b + 1] - task.starts[b];
        const uint32_t *mine = sketches.read(task.starts[a], size_a, own);
        const uint32_t *row = sketches.read(task.starts[b], size_b, other);
        if (!mine || !row) return false;
        alike = similarity(mine, size_a, task.shingles[a] <= task.sketch, row, size_b, task.shingles[b] <= task.sketch);
        return true;
    }
};

}  // namespace puyu
