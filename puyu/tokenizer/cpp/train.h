// Learning merges: a table of pieces with their counts, and the merges of the most frequent pairs over it.
#pragma once
#include <queue>
#include <unordered_map>

#include "encode.h"

namespace puyu {

// Piece -> count. A record is: count (8 bytes), size (4), bytes, padded to 8; slots hold places in units of 8 bytes.
class Pieces {
   public:
    Pieces() : slots_(1 << 16, 0) { blocks_.push_back(std::make_unique<uint8_t[]>(kBlock)), used_ = 8; }

    void add(const uint8_t* bytes, size_t size, int64_t weight) {
        size_t mask = slots_.size() - 1, slot = hash_of(bytes, size) & mask;
        for (; slots_[slot]; slot = (slot + 1) & mask) {
            uint8_t* record = at(slots_[slot]);
            if (size_of(record) == size && std::memcmp(record + 12, bytes, size) == 0) {
                *reinterpret_cast<int64_t*>(record) += weight;
                return;
            }
        }
        slots_[slot] = append(bytes, size, weight);
        if (++count_ * 10 > slots_.size() * 7) grow();
    }

    // Threshold sampling (Duffield, Lund, Thorup 2005): a piece seen c times stays with probability min(1, c / k) and
    // then counts max(c, k) times, so that sums are right on average. Which ones stay is told by their bytes alone.
    template <typename F>
    void kept(int64_t k, F each) const {
        for (uint32_t place : slots_) {
            if (!place) continue;
            const uint8_t* record = at(place);
            int64_t count = *reinterpret_cast<const int64_t*>(record);
            uint32_t size = size_of(record);
            if (count >= k || int64_t(mix(hash_of(record + 12, size), 77) & uint64_t(k - 1)) < count)
                each(record + 12, size, std::max(count, k));
        }
    }

   private:
    static constexpr size_t kBlock = size_t(1) << 24;
    std::vector<uint32_t> slots_;
    std::vector<std::unique_ptr<uint8_t[]>> blocks_;
    size_t used_, count_ = 0;

    uint8_t* at(uint32_t place) const { return &blocks_[place >> 21][size_t(place & 0x1FFFFF) * 8]; }
    static uint32_t size_of(const uint8_t* record) { return *reinterpret_cast<const uint32_t*>(record + 8); }

    uint32_t append(const uint8_t* bytes, size_t size, int64_t weight) {
        size_t need = (12 + size + 7) & ~size_t(7);
        if (used_ + need > kBlock) blocks_.push_back(std::make_unique<uint8_t[]>(kBlock)), used_ = 0;
        uint8_t* record = &blocks_.back()[used_];
        *reinterpret_cast<int64_t*>(record) = weight;
        *reinterpret_cast<uint32_t*>(record + 8) = uint32_t(size);
        std::memcpy(record + 12, bytes, size);
        uint32_t place = uint32_t((blocks_.size() - 1) << 21 | used_ / 8);
        used_ += need;
        return place;
    }

    void grow() {
        std::vector<uint32_t> wider(slots_.size() * 2, 0);
        size_t mask = wider.size() - 1;
        for (uint32_t place : slots_) {
            if (!place) continue;
            const uint8_t* record = at(place);
            size_t slot = hash_of(record + 12, size_of(record)) & mask;
            while (wider[slot]) slot = (slot + 1) & mask;
            wider[slot] = place;
        }
        slots_.swap(wider);
    }
};

// A pair occurs only beside a token that was made with it or before it, so all of its places are known when the younger
// of its two tokens is made: lists of words are written once, and a count only falls.
class Trainer {
   public:
    // ids of all words in a row, changed in place; starts [words + 1]; one count for each word.
    Trainer(int32_t* ids, const int64_t* starts, const int64_t* counts, int64_t words, int64_t tokens, int64_t wanted,
            int64_t least)
        : ids_(ids), starts_(starts), counts_(counts), least_(least), next_(tokens), wanted_(wanted) {
        sizes_.resize(words);
        for (int64_t w = 0; w < words; ++w) sizes_[w] = uint32_t(starts[w + 1] - starts[w]);
        for (Side* side : {&lost_left_, &lost_right_, &left_, &right_}) side->sums.assign(std::max(tokens, wanted), 0);
        places_.assign(std::max(tokens, wanted) * 2, 0);
        made_.assign(std::max(tokens, wanted) * 2, nullptr);
        first_pairs(words);
    }

    // Up to `limit` merges as (left, right); fewer when no pair is frequent enough any more.
    int64_t learn(int64_t limit, int32_t* merges) {
        int64_t done = 0;
        while (done < limit && next_ < wanted_ && !heap_.empty()) {
            Claim top = heap_.top();
            heap_.pop();
            auto found = pairs_.find(top.pair);
            if (found == pairs_.end()) continue;
            if (found->second.count != top.count) {
                shrink(top.pair, found->second);
                heap_.push({found->second.count, top.pair});
                continue;
            }
            std::vector<uint32_t> words = std::move(found->second.words);
            pairs_.erase(found);
            merges[2 * done] = int32_t(top.pair >> 32), merges[2 * done + 1] = int32_t(top.pair & kNone);
            merge(uint32_t(top.pair >> 32), uint32_t(top.pair), words);
            ++next_, ++done;
        }
        return done;
    }

   private:
    struct Pair {
        int64_t count = 0, since = 0;  // `since`: the count when its words were listed
        std::vector<uint32_t> words;
    };
    struct Claim {
        int64_t count;
        uint64_t pair;
        bool operator<(const Claim& other) const {
            return count != other.count ? count < other.count : pair > other.pair;
        }
    };
    struct Side {  // sums by the neighbor of a merge
        std::vector<int64_t> sums;
        std::vector<uint32_t> seen;
        void add(uint32_t token, int64_t count) {
            if (!sums[token]) seen.push_back(token);
            sums[token] += count;
        }
    };
    struct Event {
        uint32_t token, word;
        bool right;
    };

    int32_t* ids_;
    const int64_t *starts_, *counts_;
    int64_t least_, next_, wanted_;
    std::vector<uint32_t> sizes_;
    std::unordered_map<uint64_t, Pair> pairs_;
    std::priority_queue<Claim> heap_;
    Side lost_left_, lost_right_, left_, right_;
    std::vector<uint32_t> places_;  // of each neighbor, left and right: its events
    std::vector<Pair*> made_;       // and its new pair, when it is frequent enough
    std::vector<Event> events_;

    static uint64_t key(uint64_t left, uint64_t right) { return left << 32 | right; }

    void first_pairs(int64_t words) {
        for (int64_t w = 0; w < words; ++w)
            for (int64_t i = starts_[w]; i + 1 < starts_[w + 1]; ++i) {
                Pair& pair = pairs_[key(ids_[i], ids_[i + 1])];
                pair.count += counts_[w];
                ++pair.since;  // for now: its places
            }
        for (auto it = pairs_.begin(); it != pairs_.end();) {
            if (it->second.count < least_) {
                it = pairs_.erase(it);
                continue;
            }
            it->second.words.reserve(it->second.since);
            it->second.since = it->second.count;
            heap_.push({it->second.count, it->first});
            ++it;
        }
        for (int64_t w = 0; w < words; ++w)
            for (int64_t i = starts_[w]; i + 1 < starts_[w + 1]; ++i) {
                auto found = pairs_.find(key(ids_[i], ids_[i + 1]));
                if (found != pairs_.end()) list(found->second.words, uint32_t(w));
            }
    }

    // Words lie anywhere in memory: what each one needs is fetched while those before it are worked on.
    template <typename F>
    void each(const std::vector<uint32_t>& words, F visit) const {
        constexpr size_t kFar = 24, kNear = 12;
        for (size_t n = 0; n < words.size(); ++n) {
            if (n + kFar < words.size()) {
                uint32_t word = words[n + kFar];
                __builtin_prefetch(starts_ + word), __builtin_prefetch(counts_ + word);
                __builtin_prefetch(sizes_.data() + word, 1);
            }
            if (n + kNear < words.size()) __builtin_prefetch(ids_ + starts_[words[n + kNear]], 1);
            visit(words[n]);
        }
    }

    static void list(std::vector<uint32_t>& words, uint32_t word) {
        if (words.empty() || words.back() != word) words.push_back(word);
    }

    bool holds(uint32_t word, int32_t left, int32_t right) const {
        const int32_t* at = ids_ + starts_[word];
        for (uint32_t i = 0; i + 1 < sizes_[word]; ++i)
            if (at[i] == left && at[i + 1] == right) return true;
        return false;
    }

    // Forget the words that a pair has left, once half of it is gone.
    void shrink(uint64_t pair, Pair& found) {
        if (found.count * 2 > found.since) return;
        std::vector<uint32_t> still;
        each(found.words, [&](uint32_t word) {
            if (holds(word, int32_t(pair >> 32), int32_t(pair & kNone))) still.push_back(word);
        });
        still.shrink_to_fit();
        found.words.swap(still);
        found.since = found.count;
    }

    void merge(uint32_t left, uint32_t right, const std::vector<uint32_t>& words) {
        events_.clear();
        each(words, [&](uint32_t word) { merge_word(int32_t(left), int32_t(right), word); });
        for (uint32_t token : lost_left_.seen) lose(key(token, left), lost_left_.sums[token], key(left, right));
        for (uint32_t token : lost_right_.seen) lose(key(right, token), lost_right_.sums[token], key(left, right));
        gain();
        for (Side* side : {&lost_left_, &lost_right_, &left_, &right_}) {
            for (uint32_t token : side->seen) side->sums[token] = 0;
            side->seen.clear();
        }
    }

    void merge_word(int32_t left, int32_t right, uint32_t word) {
        int32_t *at = ids_ + starts_[word], made = int32_t(next_);
        uint32_t size = sizes_[word], out = 0;
        int64_t count = counts_[word];
        for (uint32_t i = 0; i < size;) {
            if (at[i] != left || i + 1 == size || at[i + 1] != right) {
                at[out++] = at[i++];
                continue;
            }
            if (out) {  // the token before; when it was made just now, the pair between the two was (right, left)
                int32_t other = at[out - 1];
                lost_left_.add(other == made ? right : other, count);
                left_.add(other, count);
                events_.push_back({uint32_t(other), word, false});
            }
            at[out++] = made;
            i += 2;
            bool again = i + 1 < size && at[i] == left && at[i + 1] == right;
            if (i < size && !again) {
                lost_right_.add(at[i], count);
                right_.add(at[i], count);
                events_.push_back({uint32_t(at[i]), word, true});
            }
        }
        sizes_[word] = out;
    }

    void lose(uint64_t pair, int64_t count, uint64_t merged) {
        auto found = pairs_.find(pair);
        if (found == pairs_.end() || pair == merged) return;
        found->second.count -= count;
        if (found->second.count < least_) pairs_.erase(found);
    }

    // Make the pairs that are frequent enough, with the words that hold them.
    void gain() {
        for (const Event& event : events_) ++places_[event.token * 2 + event.right];
        for (bool right : {false, true}) {
            Side& side = right ? right_ : left_;
            for (uint32_t token : side.seen) {
                if (side.sums[token] < least_) continue;
                uint64_t pair = right ? key(next_, token) : key(token, next_);
                Pair& made = pairs_[pair];
                made.count = made.since = side.sums[token];
                made.words.reserve(places_[token * 2 + right]);
                made_[token * 2 + right] = &made;
                heap_.push({made.count, pair});
            }
        }
        for (const Event& event : events_)
            if (Pair* pair = made_[event.token * 2 + event.right]) list(pair->words, event.word);
        for (const Event& event : events_) {
            places_[event.token * 2 + event.right] = 0;
            made_[event.token * 2 + event.right] = nullptr;
        }
    }
};

}  // namespace puyu
