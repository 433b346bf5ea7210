// Cuts UTF-8 text into pre-tokens by a pattern that puyu/tokenizer/pattern.py has parsed: alternatives of items over sets
// of kinds of characters, leftmost alternative first, greedy with backtracking, as Oniguruma does.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace puyu {

constexpr uint8_t kForeign = 63;  // a kind that no pattern holds: such a text is left to `tokenizers`

inline uint32_t code_point(const uint8_t* at) {
    if (at[0] < 0x80) return at[0];
    if (at[0] < 0xE0) return (at[0] & 31u) << 6 | (at[1] & 63u);
    if (at[0] < 0xF0) return (at[0] & 15u) << 12 | (at[1] & 63u) << 6 | (at[2] & 63u);
    return (at[0] & 7u) << 18 | (at[1] & 63u) << 12 | (at[2] & 63u) << 6 | (at[3] & 63u);
}

inline int width(uint8_t first) { return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4; }

inline const uint8_t* before(const uint8_t* at) {
    do --at;
    while ((*at & 0xC0) == 0x80);
    return at;
}

enum ItemType : int64_t { kCharacters = 0, kNotFollowedBy = 1, kWords = 2 };

struct Item {
    int64_t type, least, most;                  // `most` < 0: any number
    uint64_t mask;                              // kinds
    std::vector<std::vector<uint64_t>> words;   // kWords: each a sequence of sets of kinds; least 0: may be missing
    bool last_that_can_fail = false;            // what follows always matches, so nothing is ever given back
};

class Splitter {
   public:
    // program: alternatives, then of each its items, then of each: type, least, most, mask, words, (size, masks)...
    Splitter(const int64_t* program, const uint8_t* kinds) : kinds_(kinds, kinds + 0x110000) {
        const int64_t* at = program;
        alternatives_.resize(*at++);
        for (auto& items : alternatives_) {
            items.resize(*at++);
            for (auto& item : items) {
                item.type = *at++, item.least = *at++, item.most = *at++, item.mask = uint64_t(*at++);
                item.words.resize(*at++);
                for (auto& word : item.words) {
                    word.resize(*at++);
                    for (auto& mask : word) mask = uint64_t(*at++);
                }
            }
            bool sure = true;
            for (size_t n = items.size(); n-- > 0;) {
                items[n].last_that_can_fail = sure;
                sure = sure && items[n].least == 0 && items[n].type != kNotFollowedBy;
            }
        }
        for (int kind = 0; kind < 64; ++kind)
            for (size_t n = 0; n < alternatives_.size(); ++n)
                if (can_begin(alternatives_[n], kind)) starts_[kind].push_back(int(n));
    }

    // The end of the piece that begins here; nullptr at a character that is left to `tokenizers`.
    const uint8_t* next(const uint8_t* at, const uint8_t* end) const {
        const uint8_t* gap = at;
        while (gap < end) {
            uint8_t kind = kind_of(gap);
            if (kind == kForeign) return gap == at ? nullptr : gap;
            for (int n : starts_[kind]) {
                const uint8_t* found = match(alternatives_[n], 0, gap, end);
                if (found) return gap == at ? found : gap;
            }
            gap += width(*gap);  // what no alternative matches is a piece of its own
        }
        return end;
    }

   private:
    std::vector<uint8_t> kinds_;
    std::vector<std::vector<Item>> alternatives_;
    std::vector<int> starts_[64];

    uint8_t kind_of(const uint8_t* at) const { return kinds_[*at < 0x80 ? *at : code_point(at)]; }
    bool is(const uint8_t* at, uint64_t mask) const { return mask >> kind_of(at) & 1; }

    static bool can_begin(const std::vector<Item>& items, int kind) {
        for (const auto& item : items) {
            if (item.type == kNotFollowedBy) return true;
            if (item.mask >> kind & 1) return true;
            for (const auto& word : item.words)
                if (word[0] >> kind & 1) return true;
            if (item.least > 0) return false;
        }
        return true;
    }

    const uint8_t* match(const std::vector<Item>& items, size_t n, const uint8_t* at, const uint8_t* end) const {
        for (; n < items.size(); ++n) {
            const Item& item = items[n];
            if (item.type == kNotFollowedBy) {
                if (at < end && is(at, item.mask)) return nullptr;
            } else if (item.type == kWords) {
                return match_words(items, n, at, end);
            } else {
                const uint8_t* first = at;
                int64_t count = 0;
                while (at < end && count != item.most && is(at, item.mask)) at += width(*at), ++count;
                if (count < item.least) return nullptr;
                if (item.last_that_can_fail || count == item.least) continue;
                for (;; at = before(at), --count) {
                    if (const uint8_t* found = match(items, n + 1, at, end)) return found;
                    if (count == item.least || at == first) return nullptr;
                }
            }
        }
        return at;
    }

    const uint8_t* match_words(const std::vector<Item>& items, size_t n, const uint8_t* at, const uint8_t* end) const {
        for (const auto& word : items[n].words) {
            const uint8_t* p = at;
            size_t k = 0;
            while (k < word.size() && p < end && is(p, word[k])) p += width(*p), ++k;
            if (k < word.size()) continue;
            if (const uint8_t* found = match(items, n + 1, p, end)) return found;
        }
        return items[n].least == 0 ? match(items, n + 1, at, end) : nullptr;
    }
};

inline uint64_t mix(uint64_t a, uint64_t b) {
    __uint128_t product = __uint128_t(a ^ 0x9E3779B97F4A7C15ull) * (b ^ 0xD6E8FEB86659FD93ull);
    return uint64_t(product) ^ uint64_t(product >> 64);
}

// A hash of bytes that is the same on every machine of one byte order.
inline uint64_t hash_of(const uint8_t* at, size_t size) {
    uint64_t hash = size, word = 0;
    for (; size >= 8; at += 8, size -= 8) std::memcpy(&word, at, 8), hash = mix(hash, word);
    word = 0;
    std::memcpy(&word, at, size);
    return mix(mix(hash, word), 0x2545F4914F6CDD1Dull);
}

}  // namespace puyu
