// Byte-level BPE of one piece: the pair of the lowest rank, leftmost first, until none is left. Exact for any list of
// merges; n log n in the length of a piece at worst.
#pragma once
#include <algorithm>
#include <memory>
#include <mutex>

#include "split.h"

namespace puyu {

constexpr uint32_t kNone = 0xFFFFFFFFu;
constexpr uint32_t kNoRank = 0xFFFFFFu;

struct Cached {
    uint8_t size, count;  // size 0: empty
    uint8_t bytes[30];
    int32_t ids[8];
};

struct Cache {
    static constexpr size_t kSlots = 1 << 14;
    std::vector<Cached> slots{kSlots};
};

class Encoder {
   public:
    // merges [count, 3]: left, right, new id, best first. words: whole pieces that are one token before any merge.
    Encoder(const int32_t* byte_ids, const int32_t* merges, int64_t count) : merged_(count) {
        std::copy(byte_ids, byte_ids + 256, byte_ids_);
        size_t size = 1024;
        while (size < size_t(count) * 2) size *= 2;
        table_.assign(size, ~0ull);
        for (int64_t rank = 0; rank < count; ++rank) {
            uint32_t left = merges[3 * rank], right = merges[3 * rank + 1];
            merged_[rank] = merges[3 * rank + 2];
            put(left, right, uint32_t(rank));
        }
        find_characters(merges, count);
    }

    void set_words(const uint8_t* bytes, const int64_t* starts, const int32_t* ids, int64_t count) {
        word_bytes_.assign(bytes, bytes + starts[count]);
        size_t size = 1024;
        while (size < size_t(count) * 2) size *= 2;
        words_.assign(size, Word{0, 0, -1});
        for (int64_t n = 0; n < count; ++n) {
            size_t slot = hash_of(bytes + starts[n], starts[n + 1] - starts[n]) & (size - 1);
            while (words_[slot].id >= 0) slot = (slot + 1) & (size - 1);
            words_[slot] = Word{uint32_t(starts[n]), uint32_t(starts[n + 1] - starts[n]), ids[n]};
        }
    }

    // Writes at most `size` ids; returns the end.
    int32_t* piece(const uint8_t* bytes, size_t size, int32_t* out, Cache& cache) const {
        if (size == 1) return *out++ = byte_ids_[*bytes], out;
        if (size > sizeof(Cached::bytes)) return uncached(bytes, size, out);
        Cached& slot = cache.slots[hash_of(bytes, size) & (Cache::kSlots - 1)];
        if (slot.size == size && std::memcmp(slot.bytes, bytes, size) == 0) {
            std::memcpy(out, slot.ids, sizeof(slot.ids));  // a piece of n bytes has room for n ids: see `room`
            return out + slot.count;
        }
        int32_t* end = uncached(bytes, size, out);
        if (end - out <= 8) {
            slot.size = uint8_t(size), slot.count = uint8_t(end - out);
            std::memcpy(slot.bytes, bytes, size);
            std::memcpy(slot.ids, out, (end - out) * sizeof(int32_t));
        }
        return end;
    }

    std::unique_ptr<Cache> take() const {
        std::lock_guard<std::mutex> lock(mutex_);
        if (spare_.empty()) return std::make_unique<Cache>();
        auto cache = std::move(spare_.back());
        spare_.pop_back();
        return cache;
    }

    void give(std::unique_ptr<Cache> cache) const {
        std::lock_guard<std::mutex> lock(mutex_);
        spare_.push_back(std::move(cache));
    }

   private:
    struct Word {
        uint32_t start, size;
        int32_t id;
    };
    int32_t byte_ids_[256];
    std::vector<int32_t> merged_;
    std::vector<uint64_t> table_;  // left (20 bits), right (20 bits), rank (24 bits)
    std::vector<int32_t> characters_ = std::vector<int32_t>(65536, -1);
    std::vector<Word> words_;
    std::vector<uint8_t> word_bytes_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Cache>> spare_;

    size_t slot_of(uint64_t key) const { return size_t((key * 0x9E3779B97F4A7C15ull) >> 32) & (table_.size() - 1); }

    void put(uint32_t left, uint32_t right, uint32_t rank) {
        uint64_t key = uint64_t(left) << 20 | right;
        for (size_t slot = slot_of(key);; slot = (slot + 1) & (table_.size() - 1)) {
            if (table_[slot] == ~0ull) {
                table_[slot] = key << 24 | rank;
                return;
            }
            if (table_[slot] >> 24 == key) {
                table_[slot] = key << 24 | rank;  // named twice: the later counts, as in `tokenizers`
                return;
            }
        }
    }

    uint32_t rank_of(uint32_t left, uint32_t right) const {
        uint64_t key = uint64_t(left) << 20 | right;
        for (size_t slot = slot_of(key);; slot = (slot + 1) & (table_.size() - 1)) {
            uint64_t entry = table_[slot];
            if (entry >> 24 == key && entry != ~0ull) return uint32_t(entry) & kNoRank;
            if (entry == ~0ull) return kNoRank;
        }
    }

    int32_t* uncached(const uint8_t* bytes, size_t size, int32_t* out) const {
        if (!words_.empty()) {
            for (size_t slot = hash_of(bytes, size) & (words_.size() - 1); words_[slot].id >= 0;
                 slot = (slot + 1) & (words_.size() - 1)) {
                const Word& word = words_[slot];
                if (word.size == size && std::memcmp(&word_bytes_[word.start], bytes, size) == 0)
                    return *out++ = word.id, out;
            }
        }
        return size <= 256 ? short_piece(bytes, int(size), out) : long_piece(bytes, size, out);
    }

    // Characters of two and three bytes that become one token whatever stands beside them. When every merge comes after
    // those that make its parts, merging in rank order is the same as one rank after the other; so a part of a
    // character is lost to a neighbor only through a merge that comes before the one which completes it.
    void find_characters(const int32_t* merges, int64_t count) {
        int32_t most = *std::max_element(byte_ids_, byte_ids_ + 256);
        for (int64_t n = 0; n < 3 * count; ++n) most = std::max(most, merges[n]);
        std::vector<int64_t> made(most + 1, -1);
        std::vector<uint8_t> first(most + 1, 0);
        for (int byte = 0; byte < 256; ++byte) first[byte_ids_[byte]] = uint8_t(byte);
        std::vector<uint32_t> from_left(most + 1, kNoRank), from_right(most + 1, kNoRank);
        for (int64_t rank = 0; rank < count; ++rank) made[merges[3 * rank + 2]] = rank;
        for (int64_t rank = 0; rank < count; ++rank) {
            int32_t left = merges[3 * rank], right = merges[3 * rank + 1];
            if (made[left] >= rank || made[right] >= rank) return;
            first[merges[3 * rank + 2]] = first[left];
            from_left[right] = std::min(from_left[right], uint32_t(rank));
            if ((first[right] & 0xC0) != 0x80) from_right[left] = std::min(from_right[left], uint32_t(rank));
        }
        for (int point = 0x80; point < 0x10000; ++point) {
            int32_t parts[3];
            int size = point < 0x800 ? 2 : 3;
            parts[0] = byte_ids_[size == 2 ? 0xC0 | point >> 6 : 0xE0 | point >> 12];
            parts[size - 2] = size == 2 ? parts[0] : byte_ids_[0x80 | (point >> 6 & 63)];
            parts[size - 1] = byte_ids_[0x80 | (point & 63)];
            while (size > 1) {
                int at = size == 3 && rank_of(parts[1], parts[2]) < rank_of(parts[0], parts[1]) ? 1 : 0;
                uint32_t rank = rank_of(parts[at], parts[at + 1]);
                if (rank == kNoRank || (at == 0 && from_left[parts[0]] < rank) ||
                    (at + 2 == size && from_right[parts[size - 1]] < rank))
                    break;
                parts[at] = merged_[rank];
                if (at == 0 && size == 3) parts[1] = parts[2];
                --size;
            }
            if (size == 1) characters_[point] = parts[0];
        }
    }

    // Whole characters where that is certain, else bytes: (id of each token, how many).
    size_t first_tokens(const uint8_t* bytes, size_t size, int32_t* ids) const {
        size_t count = 0;
        for (const uint8_t *at = bytes, *end = bytes + size; at < end;) {
            int wide = *at < 0xC0 || *at >= 0xF0 ? 1 : width(*at);
            int32_t whole = wide == 1 || end - at < wide ? -1 : characters_[code_point(at)];
            ids[count++] = whole >= 0 ? whole : byte_ids_[*at];
            at += whole >= 0 ? wide : 1;
        }
        return count;
    }

    // Up to 256 bytes: rank and place of each pair in one word, so that one minimum finds both.
    int32_t* short_piece(const uint8_t* bytes, int length, int32_t* out) const {
        alignas(64) uint32_t keys[256];
        int32_t ids[256];
        uint16_t next[257], prev[258];
        int size = int(first_tokens(bytes, size_t(length), ids)), padded = (size + 15) & ~15;
        for (int i = 0; i < size; ++i) {
            next[i] = uint16_t(i + 1), prev[i + 1] = uint16_t(i);
            keys[i] = i + 1 < size ? rank_of(ids[i], ids[i + 1]) << 8 | uint32_t(i) : kNone;
        }
        for (int i = size; i < padded; ++i) keys[i] = kNone;
        for (;;) {
            uint32_t best = kNone;
#pragma GCC ivdep
            for (int i = 0; i < padded; ++i) best = std::min(best, keys[i]);
            if (best >> 8 == kNoRank) break;
            int i = best & 255, gone = next[i], after = next[gone];
            ids[i] = merged_[best >> 8];
            next[i] = uint16_t(after), prev[after] = uint16_t(i);
            keys[gone] = kNone;
            keys[i] = after < size ? rank_of(ids[i], ids[after]) << 8 | uint32_t(i) : kNone;
            if (i) {
                int left = prev[i];
                keys[left] = rank_of(ids[left], ids[i]) << 8 | uint32_t(left);
            }
        }
        for (int i = 0; i < size; i = next[i]) *out++ = ids[i];
        return out;
    }

    int32_t* long_piece(const uint8_t* bytes, size_t length, int32_t* out) const {
        std::vector<int32_t> ids(length);
        size_t size = first_tokens(bytes, length, ids.data());
        std::vector<uint32_t> ranks(size), next(size + 1), prev(size + 1);
        std::vector<uint64_t> heap;
        heap.reserve(size);
        for (size_t i = 0; i < size; ++i) {
            next[i] = uint32_t(i + 1), prev[i + 1] = uint32_t(i);
            ranks[i] = i + 1 < size ? rank_of(ids[i], ids[i + 1]) : kNoRank;
            if (ranks[i] != kNoRank) heap.push_back(uint64_t(ranks[i]) << 32 | i);
        }
        std::greater<uint64_t> later;
        std::make_heap(heap.begin(), heap.end(), later);
        auto rank_again = [&](size_t i) {
            ranks[i] = next[i] < size ? rank_of(ids[i], ids[next[i]]) : kNoRank;
            if (ranks[i] == kNoRank) return;
            heap.push_back(uint64_t(ranks[i]) << 32 | i);
            std::push_heap(heap.begin(), heap.end(), later);
        };
        while (!heap.empty()) {
            uint64_t best = heap.front();
            std::pop_heap(heap.begin(), heap.end(), later);
            heap.pop_back();
            size_t i = best & 0xFFFFFFFFu;
            uint32_t rank = uint32_t(best >> 32);
            if (ranks[i] != rank) continue;
            size_t gone = next[i], after = next[gone];
            ids[i] = merged_[rank];
            next[i] = uint32_t(after), prev[after] = uint32_t(i);
            ranks[gone] = kNoRank;
            rank_again(i);
            if (i) rank_again(prev[i]);
        }
        for (size_t i = 0; i < size; i = next[i]) *out++ = ids[i];
        return out;
    }
};

}  // namespace puyu
