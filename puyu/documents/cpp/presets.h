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
    return (p >= 0x0a && p <= 0x0d) || (p >= 0x1c && p <= 0x1e) || p == 0x85 || p == 0x2028 || p == 0x2029;
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
        breaks = 0;
        for (int64_t i = 0; i < text.size; i++) breaks += text.points[i] == '\n';
        if (family == GOPHER_QUALITY) quality(scores);
        else if (family == GOPHER_REPETITION) repetition(scores);
        else fineweb(scores);
    }

  private:
    struct Word {
        int64_t begin, end;
        uint64_t hash;
    };

    const Unicode &unicode;
    const uint8_t *marks;
    int64_t short_line, breaks = 0;  // line feeds of the text
    Characters text;
    std::vector<Word> words;
    Table table;
    std::vector<uint64_t> heads, powers;  // of the words joined without blanks: hashes up to each word; PRIME ** i
    std::vector<int64_t> sizes;           // characters up to each word

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
            if (i > begin) words.push_back({begin, i, hash_of(begin, i)});
            else i++;
        }
    }

    // ---- Gopher, quality

    void quality(double *scores) {
        int64_t bare = 0, bare_size = 0, letters = 0, count = int64_t(words.size());
        unsigned stop_words = 0;
        for (const Word &word : words) {
            bool is_bare = false, has_letter = false;
            for (int64_t i = word.begin; i < word.end; i++) {
                is_bare |= !(marks[text.points[i]] & MARK);
                has_letter |= text.is(i, ALPHA);
            }
            if (is_bare) bare++, bare_size += word.end - word.begin;
            letters += has_letter;
            stop_words |= stop_word(word);
        }
        int64_t hashes = 0, dots = 0;
        for (int64_t i = 0; i < text.size; i++) {
            hashes += text.points[i] == '#';
            dots += text.points[i] == 0x2026;
            if (is_ellipsis(i, text.size)) dots++, i += 2;
        }
        scores[0] = double(bare), scores[1] = over(bare_size, bare);
        scores[2] = over(hashes, count), scores[3] = over(dots, count);
        marked_lines(scores);
        scores[6] = over(letters, count), scores[7] = __builtin_popcount(stop_words);
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
        static constexpr std::string_view WORDS[] = {"the", "be", "to", "of", "and", "that", "have", "with"};
        size_t size = size_t(text.at[word.end] - text.at[word.begin]);
        if (size < 2 || size > 4) return 0;
        std::string_view found(reinterpret_cast<const char *>(text.bytes) + text.at[word.begin], size);
        for (unsigned w = 0; w < 8; w++)
            if (found == WORDS[w]) return 1u << w;
        return 0;
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
        table.clear(breaks + 1);
        for (int64_t i = begin; i < end;) {
            int64_t run = i;
            while (run < end && text.points[run] == '\n') run++;
            if (run - i >= least) count_part(found, begin, i), begin = run;
            i = run > i ? run : i + 1;
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
        for (int n = 2; n <= 4; n++) scores[3 + n] = over(top(n), size);
        join();
        for (int n = 5; n <= 10; n++) scores[3 + n] = over(duplicated(n), size);
    }

    // Characters, blanks between words included, in the most frequent n-gram; of equally frequent ones, in the first.
    int64_t top(int n) {
        int64_t count = int64_t(words.size()) - n + 1, best = 0, first = 0;
        if (count <= 0) return 0;
        table.clear(count);
        for (int64_t i = 0; i < count; i++) {
            uint64_t key = 0;
            for (int k = 0; k < n; k++) key = key * PRIME + words[i + k].hash;
            Table::Slot &slot = table.add(mixed(key), i);
            int64_t times = ++slot.count;
            if (times > best || (times == best && slot.first < first)) best = times, first = slot.first;
        }
        int64_t size = n - 1;
        for (int k = 0; k < n; k++) size += words[first + k].end - words[first + k].begin;
        return size * best;
    }

    // A polynomial over the characters of all words, so that an n-gram's hash does not know where its words end.
    void join() {
        heads.assign(1, 0), sizes.assign(1, 0);
        uint64_t hash = 0;
        for (const Word &word : words) {
            for (int64_t i = word.begin; i < word.end; i++) hash = hash * PRIME + text.points[i] + 1;
            heads.push_back(hash), sizes.push_back(sizes.back() + word.end - word.begin);
        }
        if (powers.empty()) powers.push_back(1);
        while (int64_t(powers.size()) <= sizes.back()) powers.push_back(powers.back() * PRIME);
    }

    // Characters in n-grams that stood before, from left to right; the next one is looked for behind one that did.
    int64_t duplicated(int n) {
        int64_t count = int64_t(words.size()) - n + 1, chars = 0;
        if (count <= 0) return 0;
        table.clear(count);
        for (int64_t i = 0; i < count;) {
            int64_t size = sizes[i + n] - sizes[i];
            Table::Slot &slot = table.add(mixed(heads[i + n] - heads[i] * powers[size]), i);
            if (slot.count) chars += size, i += n;
            else slot.count = 1, i++;
        }
        return chars;
    }

    // ---- FineWeb

    void fineweb(double *scores) {
        int64_t lines = 0, ended = 0, small = 0, again = 0;
        table.clear(breaks + 1);
        for (int64_t begin = 0, i = 0; i <= text.size; i++) {
            if (i < text.size && text.points[i] != '\n') continue;
            int64_t first = begin;
            while (first < i && text.is(first, SPACE)) first++;
            if (first < i) {
                lines++;
                ended += marks[text.points[i - 1]] & TERMINAL ? 1 : 0;
                small += i - begin <= short_line;
                if (table.add(hash_of(begin, i), 0).count++) again += i - begin;
            }
            begin = i + 1;
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

    // Writes what is kept of the text to `out`, which has room for all of it; returns its end.
    uint8_t *operator()(const uint8_t *bytes, int64_t length, double *scores, uint8_t *out) {
        text.read(unicode, bytes, length);
        for (int i = 0; i < NUM_C4; i++) scores[i] = 0;
        kept.clear();
        num_kept = 0;
        bool alive = true;
        each_split_line(text, [&](int64_t begin, int64_t end) { alive = alive && line(begin, end, scores); });
        return write(out);
    }

  private:
    enum { LINES, REMOVED, LONG_WORD, UNENDED, SHORT, JAVASCRIPT, POLICY, LOREM, CURLY, SENTENCES };
    enum { HAS_LOREM = 1, HAS_JAVASCRIPT = 2, HAS_POLICY = 4 };

    const Unicode &unicode;
    const LineRules &rules;
    Characters text;
    std::vector<uint32_t> kept, bare;
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
        if (rules.citations && remove_citations() && rules.words_after_citations) words = count_words(longest);
        if (rules.num_ends > 0 && !is_ended()) return removed(UNENDED);
        if (words < rules.line_words) return removed(SHORT);
        unsigned found = phrases();
        if (rules.lorem_ipsum >= 0 && found & HAS_LOREM && ++scores[LOREM] > double(rules.lorem_ipsum)) return false;
        if (rules.javascript && found & HAS_JAVASCRIPT) return removed(JAVASCRIPT);
        if (rules.curly_brackets >= 0 && has_curly() && ++scores[CURLY] > double(rules.curly_brackets)) return false;
        if (rules.policy && found & HAS_POLICY) return removed(POLICY);
        scores[SENTENCES] += double(sentences());
        if (num_kept++) kept.push_back('\n');
        kept.insert(kept.end(), points, points + size);
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

    bool has_curly() const {
        for (int64_t i = 0; i < size; i++)
            if (points[i] == '{') return true;
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

    unsigned phrases() const {
        unsigned found = 0;
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

    static bool is_in(uint32_t point, std::u32string_view set) { return set.find(char32_t(point)) != set.npos; }

    // Ends of sentences: marks, what closes behind them, and then a blank or nothing; the rest is one more.
    int64_t sentences() const {
        int64_t count = 0, last = 0;
        for (int64_t i = 0; i < size;) {
            int64_t begin = i;
            bool wide = is_in(points[i], U"。！？");
            std::u32string_view ends = wide ? U"。！？" : U".!?", closers = wide ? U"”’」』）" : U"\"'”’)]";
            while (i < size && is_in(points[i], ends)) i++;
            if (i == begin) {
                i++;
                continue;
            }
            int64_t marked = i;
            while (i < size && is_in(points[i], closers)) i++;
            if (wide || i == size || is_space(points[i])) count++, last = i;
            else i = marked;
        }
        while (last < size && is_space(points[last])) last++;
        return last < size || !count ? count + 1 : count;
    }

    uint8_t *write(uint8_t *out) const {
        size_t begin = 0, end = kept.size();
        while (begin < end && is_space(kept[begin])) begin++;
        while (begin < end && is_space(kept[end - 1])) end--;
        for (size_t i = begin; i < end; i++) {
            uint32_t p = kept[i];
            if (p < 0x80) *out++ = uint8_t(p);
            else {
                if (p < 0x800) *out++ = uint8_t(0xc0 | p >> 6);
                else {
                    if (p < 0x10000) *out++ = uint8_t(0xe0 | p >> 12);
                    else *out++ = uint8_t(0xf0 | p >> 18), *out++ = uint8_t(0x80 | ((p >> 12) & 63));
                    *out++ = uint8_t(0x80 | ((p >> 6) & 63));
                }
                *out++ = uint8_t(0x80 | (p & 63));
            }
        }
        return out;
    }
};

}  // namespace puyu
