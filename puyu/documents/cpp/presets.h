// The statistics of published rule sets (puyu/data/published.py says what they mean), text by text.

#pragma once

#include <string_view>

#include "units.h"

namespace puyu {

enum Family : int64_t { GOPHER_QUALITY, GOPHER_REPETITION, FINEWEB, NUM_FAMILIES };
constexpr int64_t NUM_PUBLISHED[NUM_FAMILIES] = {8, 14, 5};
constexpr int64_t NUM_C4 = 10;

// What the sets count as punctuation, and as the end of a sentence: bits of a table of all code points.
enum Mark : uint8_t { MARK = 1, TERMINAL = 2 };

inline double over(int64_t part, int64_t whole) { return whole ? double(part) / double(whole) : 0.0; }

// Where str.splitlines() ends a line.
inline bool is_line_end(uint32_t p) {
    if (p > 0x1e && p != 0x85 && (p & ~1u) != 0x2028) return false;
    return (p >= 0x0a && p <= 0x0d) || p >= 0x1c;
}

// f(begin, end) of each line, as str.splitlines() gives them.
template <typename F>
void each_split_line(const Characters &text, const F &f) {
    for (int64_t i = 0; i < text.size;) {
        int64_t begin = i;
        while (i < text.size && !is_line_end(text.points[i])) i++;
        f(begin, i);
        i += i + 1 < text.size && text.points[i] == '\r' && text.points[i + 1] == '\n' ? 2 : 1;
    }
}

class Published {
  public:
    Published(const Unicode &unicode, const uint8_t *marks, int64_t short_line)
        : unicode(unicode), marks(marks), short_line(short_line) {}

    void operator()(const uint8_t *bytes, int64_t length, bool by_characters, Family family, double *scores) {
        text.read(unicode, bytes, length);
        split(by_characters);
        if (family == GOPHER_QUALITY) return quality(scores);
        feeds.clear();
        for (int64_t i = 0; i < text.size; i++)
            if (text.points[i] == '\n') feeds.push_back(i);
        family == GOPHER_REPETITION ? repetition(scores) : fineweb(scores);
    }

  private:
    static constexpr int64_t SAME = 16;

    struct Word {
        int64_t begin, end;
    };

    const Unicode &unicode;
    const uint8_t *marks;
    int64_t short_line;
    Characters text;
    std::vector<Word> words;
    std::vector<int64_t> feeds;  // places of line feeds
    Table table;
    std::vector<uint32_t> places;      // words where an n-gram may stand twice
    std::vector<Table::Slot *> slots;
    std::vector<uint64_t> hashes;      // of words
    std::vector<uint8_t> joined;       // the words without the blanks between them
    std::vector<int64_t> ends, sizes;  // bytes and characters of them up to each word

    uint64_t hash_of(int64_t begin, int64_t end) const {
        return quick_hash(text.bytes + text.at[begin], int64_t(text.at[end]) - int64_t(text.at[begin]));
    }

    // Runs of what is not blank; or Han characters and kana one by one, other letters and digits in runs.
    void split(bool by_characters) {
        words.clear();
        for (int64_t i = 0; i < text.size;) {
            int64_t begin = i;
            if (!by_characters)
                while (i < text.size && !text.is(i, SPACE)) i++;
            else if (text.is(i, HAN | KANA))
                i++;
            else
                while (i < text.size && text.is_word(i) && !text.is(i, HAN | KANA)) i++;
            if (i > begin) words.push_back({begin, i});
            else i++;
        }
    }

    // ---- Gopher, quality

    void quality(double *scores) {
        int64_t bare = 0, bare_size = 0, letters = 0, count = int64_t(words.size());
        unsigned stop_words = 0;
        for (const Word &word : words) {
            bool is_bare = false, has_letter = false;
            for (int64_t i = word.begin; i < word.end && !(is_bare && has_letter); i++) {
                is_bare |= !(marks[text.points[i]] & MARK);
                has_letter |= text.is(i, ALPHA);
            }
            if (is_bare) bare++, bare_size += word.end - word.begin;
            letters += has_letter;
            stop_words |= stop_word(word);
        }
        int64_t hashes = 0, dots = ellipses();
        for (int64_t i = 0; i < text.size; i++) hashes += text.points[i] == '#';
        scores[0] = double(bare), scores[1] = over(bare_size, bare);
        scores[2] = over(hashes, count), scores[3] = over(dots, count);
        marked_lines(scores);
        scores[6] = over(letters, count), scores[7] = __builtin_popcount(stop_words);
    }

    // How often one stands there, as str.count does.
    int64_t ellipses() const {
        int64_t dots = 0, threes = 0;
        const uint32_t *p = text.points.data();
        for (int64_t i = 0; i < text.size; i++) dots += p[i] == 0x2026;
        for (int64_t i = 0; i + 2 < text.size; i++) threes += p[i] == '.' && p[i + 1] == '.' && p[i + 2] == '.';
        if (threes > 1)  // which may overlap
            for (int64_t i = threes = 0; i + 2 < text.size; i++)
                if (is_ellipsis(i, text.size)) threes++, i += 2;
        return dots + threes;
    }

    bool is_ellipsis(int64_t i, int64_t end) const {
        return i + 2 < end && text.points[i] == '.' && text.points[i + 1] == '.' && text.points[i + 2] == '.';
    }

    void marked_lines(double *scores) const {
        int64_t lines = 0, bullets = 0, ellipses = 0;
        each_split_line(text, [&](int64_t begin, int64_t end) {
            lines++;
            while (begin < end && text.is(begin, SPACE)) begin++;
            while (begin < end && text.is(end - 1, SPACE)) end--;
            if (begin == end) return;
            bullets += text.points[begin] == 0x2022 || text.points[begin] == '-';
            ellipses += text.points[end - 1] == 0x2026 || (end - begin >= 3 && is_ellipsis(end - 3, end));
        });
        scores[4] = over(bullets, lines), scores[5] = over(ellipses, lines);
    }

    // A bit for each of the eight words, as they stand.
    unsigned stop_word(const Word &word) const {
        int64_t size = word.end - word.begin;
        if (size < 2 || size > 4) return 0;
        uint64_t found = 0;
        for (int64_t i = word.begin; i < word.end; i++) {
            if (text.points[i] > 'z') return 0;
            found = found << 16 | text.points[i];
        }
        auto is = [&](std::string_view ascii) {
            uint64_t wanted = 0;
            for (char c : ascii) wanted = wanted << 16 | uint64_t(c);
            return found == wanted;
        };
        return is("the") | is("be") << 1 | is("to") << 2 | is("of") << 3 | is("and") << 4 | is("that") << 5 |
               is("have") << 6 | is("with") << 7;
    }

    // ---- Gopher, repetition

    struct Repeated {
        int64_t parts = 0, again = 0, chars = 0;
    };

    void count_part(Repeated &found, int64_t begin, int64_t end) {
        found.parts++;
        if (table.add(hash_of(begin, end), 0).count++) found.again++, found.chars += end - begin;
    }

    // Parts of [begin, end) between runs of at least `least` line feeds.
    Repeated repeated_parts(int64_t begin, int64_t end, int64_t least) {
        Repeated found;
        table.clear(int64_t(feeds.size()) + 1);
        for (size_t k = 0; k < feeds.size();) {
            int64_t first = feeds[k], behind = first;
            for (; k < feeds.size() && feeds[k] == behind; k++) behind++;
            if (behind - first < least || first < begin || first >= end) continue;
            count_part(found, begin, first), begin = behind;
        }
        count_part(found, begin, end);
        return found;
    }

    void repetition(double *scores) {
        int64_t size = text.size, begin = 0, end = size;
        while (begin < end && text.is(begin, SPACE)) begin++;
        while (begin < end && text.is(end - 1, SPACE)) end--;
        Repeated paragraphs = repeated_parts(begin, end, 2), lines = repeated_parts(0, size, 1);
        scores[0] = double(size);
        scores[1] = over(paragraphs.again, paragraphs.parts), scores[2] = over(paragraphs.chars, size);
        scores[3] = over(lines.again, lines.parts), scores[4] = over(lines.chars, size);
        join();
        top_ngrams(scores);
        shared_beginnings();
        for (int n = 5; n <= 10; n++) scores[3 + n] = over(duplicated(n), size);
    }

    // Of the most frequent n-gram (of equally frequent ones, the first): its characters, blanks between words included.
    // It can only stand twice where the shorter ones in it do, so each length looks at what the one before left.
    void top_ngrams(double *scores) {
        int64_t count = int64_t(words.size());
        places.resize(size_t(count));
        for (int64_t i = 0; i < count; i++) places[size_t(i)] = uint32_t(i);
        for (int n = 2; n <= 4; n++) {
            int64_t best = 1, first = 0, left = 0;
            table.clear(int64_t(places.size()));
            slots.clear();
            for (uint32_t i : places) {
                if (i + n > count) break;
                uint64_t key = 0;
                for (int k = 0; k < n; k++) key = key * PRIME + hashes[size_t(i + k)];
                Table::Slot &slot = table.add(mixed(key), i);
                slots.push_back(&slot);
                int64_t times = ++slot.count;
                if (times > best || (times == best && slot.first < first)) best = times, first = slot.first;
            }
            int64_t size = n - 1;
            for (int k = 0; k < n && first + k < count; k++) size += words[first + k].end - words[first + k].begin;
            scores[3 + n] = n <= count ? over(size * best, text.size) : 0;
            for (size_t i = 0; i + 1 < slots.size(); i++)
                if (slots[i]->count > 1 && slots[i + 1]->count > 1 && places[i + 1] == places[i] + 1)
                    places[size_t(left++)] = places[i];
            places.resize(size_t(left));
        }
    }

    // All words without the blanks between them, with room behind, and the hash of each.
    void join() {
        int64_t count = int64_t(words.size()), total = text.at[text.size];
        joined.resize(size_t(total + SAME)), hashes.resize(size_t(count));
        ends.resize(size_t(count + 1)), sizes.resize(size_t(count + 1));
        uint8_t *out = joined.data();
        ends[0] = sizes[0] = 0;
        for (int64_t w = 0; w < count; w++) {
            const Word &word = words[size_t(w)];
            int64_t begin = text.at[word.begin], length = int64_t(text.at[word.end]) - begin;
            if (length <= SAME && begin + SAME <= total) std::memcpy(out, text.bytes + begin, SAME);  // no call
            else std::memcpy(out, text.bytes + begin, size_t(length));
            hashes[size_t(w)] = length <= 8 ? small_hash(out, length) : quick_hash(out, length);
            out += length;
            ends[size_t(w + 1)] = out - joined.data();
            sizes[size_t(w + 1)] = sizes[size_t(w)] + word.end - word.begin;
        }
    }

    // Of one to eight bytes, where eight can be read.
    static uint64_t small_hash(const uint8_t *bytes, int64_t length) {
        uint64_t word;
        std::memcpy(&word, bytes, 8);
        return mixed((word << (64 - 8 * length)) + uint64_t(length));
    }

    // The places where an n-gram of five and more can stand twice: those that begin with the same bytes as another, and
    // the few whose five words are shorter than that.
    void shared_beginnings() {
        int64_t count = int64_t(words.size());
        places.clear(), slots.clear();
        table.clear(count);
        for (int64_t i = 0; i + 5 <= count; i++) {
            Table::Slot *slot = nullptr;
            if (ends[size_t(i + 5)] - ends[size_t(i)] >= SAME) {
                uint64_t half[2];
                std::memcpy(half, joined.data() + ends[size_t(i)], SAME);
                slot = &table.add(mixed(half[0] * PRIME ^ mixed(half[1])), i);
                slot->count++;
            }
            slots.push_back(slot);
        }
        for (size_t i = 0; i < slots.size(); i++)
            if (!slots[i] || slots[i]->count > 1) places.push_back(uint32_t(i));
    }

    // Characters in n-grams that stood before, from left to right; the next one is looked for behind one that did.
    // An n-gram does not know where its words end.
    int64_t duplicated(int n) {
        int64_t count = int64_t(words.size()), next = 0, chars = 0;
        table.clear(int64_t(places.size()));
        for (uint32_t i : places) {
            if (i < next || i + n > count) continue;
            Table::Slot &slot = table.add(quick_hash(joined.data() + ends[i], ends[i + n] - ends[i]), i);
            if (slot.count++) chars += sizes[i + n] - sizes[i], next = i + n;
        }
        return chars;
    }

    // ---- FineWeb

    void fineweb(double *scores) {
        int64_t lines = 0, ended = 0, small = 0, again = 0;
        int64_t breaks = int64_t(feeds.size()), begin = 0;
        table.clear(breaks + 1);
        for (int64_t k = 0; k <= breaks; k++) {
            int64_t end = k < breaks ? feeds[size_t(k)] : text.size, first = begin;
            while (first < end && text.is(first, SPACE)) first++;
            if (first < end) {
                lines++;
                ended += marks[text.points[end - 1]] & TERMINAL ? 1 : 0;
                small += end - begin <= short_line;
                if (table.add(hash_of(begin, end), 0).count++) again += end - begin;
            }
            begin = end + 1;
        }
        int64_t count = int64_t(words.size());
        scores[0] = double(lines), scores[1] = over(ended, lines), scores[2] = over(small, lines);
        scores[3] = over(again, text.size - breaks), scores[4] = over(breaks, count > 0 ? count : 1);
    }
};

// ---- C4

// A negative number switches a rule off.
struct LineRules {
    int64_t longest_word, line_words, lorem_ipsum, curly_brackets;
    const uint32_t *ends;
    int64_t num_ends;
    int64_t citations, words_after_citations, javascript, policy;
};

class C4 {
  public:
    C4(const Unicode &unicode, const LineRules &rules) : unicode(unicode), rules(rules) {}

    // Writes what is kept of the text to `room`, which is large enough for all of it; returns its end. Blanks at either
    // side, which only stand where a citation was, are for the caller to strip.
    uint8_t *operator()(const uint8_t *bytes, int64_t length, double *scores, uint8_t *room) {
        text.read(unicode, bytes, length);
        for (int i = 0; i < NUM_C4; i++) scores[i] = 0;
        out = room;
        num_kept = 0;
        bool alive = true;
        each_split_line(text, [&](int64_t begin, int64_t end) { alive = alive && line(begin, end, scores); });
        return out;
    }

  private:
    enum { LINES, REMOVED, LONG_WORD, UNENDED, SHORT, JAVASCRIPT, POLICY, LOREM, CURLY, SENTENCES };
    enum { HAS_LOREM = 1, HAS_JAVASCRIPT = 2, HAS_POLICY = 4 };

    const Unicode &unicode;
    const LineRules &rules;
    Characters text;
    std::vector<uint32_t> bare;
    uint8_t *out = nullptr;
    const uint32_t *points = nullptr;  // of the line, without citations
    int64_t size = 0, num_kept = 0;

    bool is_space(uint32_t point) const { return unicode.kinds[point] & SPACE; }

    // False where the whole page goes.
    bool line(int64_t begin, int64_t end, double *scores) {
        while (begin < end && text.is(begin, SPACE)) begin++;
        while (begin < end && text.is(end - 1, SPACE)) end--;
        points = text.points.data() + begin, size = end - begin;
        bool counts = size > 0;
        scores[LINES] += counts;
        auto removed = [&](int why) {
            scores[REMOVED] += counts, scores[why] += counts;
            return true;
        };
        int64_t longest = 0, words = count_words(longest);
        if (rules.longest_word >= 0 && longest > rules.longest_word) return removed(LONG_WORD);
        bool opens = false, curly = false;
        for (int64_t i = 0; i < size; i++) opens |= points[i] == '[', curly |= points[i] == '{';
        bool is_bare = rules.citations && opens && remove_citations();
        if (is_bare && rules.words_after_citations) words = count_words(longest);
        if (rules.num_ends > 0 && !is_ended()) return removed(UNENDED);
        if (words < rules.line_words) return removed(SHORT);
        unsigned found = phrases();
        if (rules.lorem_ipsum >= 0 && found & HAS_LOREM && ++scores[LOREM] > double(rules.lorem_ipsum)) return false;
        if (rules.javascript && found & HAS_JAVASCRIPT) return removed(JAVASCRIPT);
        if (rules.curly_brackets >= 0 && curly && ++scores[CURLY] > double(rules.curly_brackets)) return false;
        if (rules.policy && found & HAS_POLICY) return removed(POLICY);
        scores[SENTENCES] += double(sentences());
        if (num_kept++) *out++ = '\n';
        if (is_bare) return encode(), true;
        int64_t length = int64_t(text.at[end]) - int64_t(text.at[begin]);
        std::memcpy(out, text.bytes + text.at[begin], size_t(length));
        out += length;
        return true;
    }

    int64_t count_words(int64_t &longest) const {
        int64_t words = 0;
        longest = 0;
        for (int64_t i = 0; i < size;) {
            int64_t begin = i;
            while (i < size && !is_space(points[i])) i++;
            if (i > begin) words++, longest = i - begin > longest ? i - begin : longest;
            else i++;
        }
        return words;
    }

    bool stands(int64_t at, std::string_view ascii) const {
        if (at + int64_t(ascii.size()) > size) return false;
        for (size_t k = 0; k < ascii.size(); k++)
            if (points[at + int64_t(k)] != uint32_t(ascii[k])) return false;
        return true;
    }

    // Characters of [12], [edit] or [citation needed] there, 0 where none stands.
    int64_t citation(int64_t at) const {
        if (points[at] != '[') return 0;
        int64_t i = at + 1;
        while (i < size && unicode.kinds[points[i]] & DIGIT) i++;
        if (i < size && points[i] == ']') return i + 1 - at;
        if (stands(at, "[edit]")) return 6;
        return stands(at, "[citation needed]") ? 17 : 0;
    }

    bool remove_citations() {
        int64_t at = 0;
        while (at < size && !citation(at)) at++;
        if (at == size) return false;
        bare.assign(points, points + at);
        while (at < size) {
            int64_t gone = citation(at);
            if (!gone) bare.push_back(points[at]);
            at += gone ? gone : 1;
        }
        points = bare.data(), size = int64_t(bare.size());
        return true;
    }

    bool is_ended() const {
        if (!size || (size >= 3 && stands(size - 3, "..."))) return false;
        for (int64_t i = 0; i < rules.num_ends; i++)
            if (points[size - 1] == rules.ends[i]) return true;
        return false;
    }

    // str.lower() as far as it leads to ASCII: the sign of the kelvin is the only other letter that does alone.
    static uint32_t small(uint32_t point) { return point == 0x212a ? 'k' : ascii_lower(point); }

    bool says(int64_t at, std::string_view phrase) const {
        if (at + int64_t(phrase.size()) > size) return false;
        for (size_t k = 0; k < phrase.size(); k++)
            if (small(points[at + int64_t(k)]) != uint32_t(phrase[k])) return false;
        return true;
    }

    // Whether the beginning of a phrase, or what each one about cookies holds, stands there.
    bool may_say() const {
        bool any = false;
        for (int64_t i = 0; i + 3 < size; i++) {
            uint32_t a = points[i] | 32, b = points[i + 1] | 32, c = points[i + 2] | 32, d = points[i + 3] | 32;
            any |= (a == 'c') & (b == 'o') & (c == 'o');
            any |= (a == 'j') & (b == 'a') & (c == 'v') & (d == 'a');
            any |= (a == 'l') & (b == 'o') & (c == 'r') & (d == 'e');
            any |= (a == 'p') & (b == 'r') & (c == 'i') & (d == 'v');
            any |= (a == 't') & (b == 'e') & (c == 'r') & (d == 'm');
        }
        return any;
    }

    unsigned phrases() const {
        unsigned found = 0;
        if (!may_say()) return 0;
        for (int64_t i = 0; i < size; i++) switch (points[i]) {
                case 'l': case 'L': if (says(i, "lorem ipsum")) found |= HAS_LOREM; break;
                case 'j': case 'J': if (says(i, "javascript")) found |= HAS_JAVASCRIPT; break;
                case 't': case 'T': if (says(i, "terms of use")) found |= HAS_POLICY; break;
                case 'p': case 'P': if (says(i, "privacy policy")) found |= HAS_POLICY; break;
                case 'c': case 'C': if (says(i, "cookie policy")) found |= HAS_POLICY; break;
                case 'u': case 'U':
                    if (says(i, "use cookies") || says(i, "uses cookies") || says(i, "use of cookies")) found |= HAS_POLICY;
                    break;
            }
        return found;
    }

    static bool is_end(uint32_t p) { return (p == '.') | (p == '!') | (p == '?'); }
    static bool is_wide_end(uint32_t p) { return (p == 0x3002) | (p == 0xff01) | (p == 0xff1f); }  // 。！？
    static bool is_closer(uint32_t p) {  // "'”’)]
        return (p == '"') | (p == '\'') | (p == 0x201d) | (p == 0x2019) | (p == ')') | (p == ']');
    }
    static bool is_wide_closer(uint32_t p) {  // ”’」』）
        return (p == 0x201d) | (p == 0x2019) | (p == 0x300d) | (p == 0x300f) | (p == 0xff09);
    }

    // Ends of sentences: marks, what closes behind them, and then a blank or nothing; the rest is one more.
    int64_t sentences() const {
        int64_t count = 0, last = 0;
        for (int64_t i = 0; i < size;) {
            while (i < size && !(is_end(points[i]) | is_wide_end(points[i]))) i++;
            if (i == size) break;
            bool wide = is_wide_end(points[i]);
            while (i < size && (wide ? is_wide_end(points[i]) : is_end(points[i]))) i++;
            int64_t marked = i;
            while (i < size && (wide ? is_wide_closer(points[i]) : is_closer(points[i]))) i++;
            if (wide || i == size || is_space(points[i])) count++, last = i;
            else i = marked;
        }
        while (last < size && is_space(points[last])) last++;
        return last < size || !count ? count + 1 : count;
    }

    void encode() {
        for (int64_t i = 0; i < size; i++) {
            uint32_t p = points[i];
            if (p < 0x80) {
                *out++ = uint8_t(p);
                continue;
            }
            if (p < 0x800) *out++ = uint8_t(0xc0 | p >> 6);
            else {
                if (p < 0x10000) *out++ = uint8_t(0xe0 | p >> 12);
                else *out++ = uint8_t(0xf0 | p >> 18), *out++ = uint8_t(0x80 | ((p >> 12) & 63));
                *out++ = uint8_t(0x80 | ((p >> 6) & 63));
            }
            *out++ = uint8_t(0x80 | (p & 63));
        }
    }
};

}  // namespace puyu
