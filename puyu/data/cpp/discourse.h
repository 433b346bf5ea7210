// Statistics of long texts: discourse words, cohesion, complexity, lines without sense. The twin is puyu/data/discourse.py.

#pragma once

#include <algorithm>

#include "ngram.h"

namespace puyu {

enum DiscourseScore : int {
    NUM_WORDS, CONNECTIVES, PRONOUNS, COHESION, TYPE_TOKEN, LINE_WORDS, SENTENCE_WORDS, NONSENSE, NUM_DISCOURSE
};

enum WordClass : uint8_t { CONNECTIVE = 1, PRONOUN = 2 };

struct Phrases {
    Slots slots;
    const uint8_t *classes;
    int64_t longest;  // units
};

struct DiscourseOptions {
    int64_t window;   // words over which different ones are counted
    int64_t passage;  // words from which on a passage ends with its sentence or line
};

class Discourse {
  public:
    Discourse(const Unicode &unicode, const Phrases &phrases, const DiscourseOptions &options)
        : unicode(unicode), phrases(phrases), options(options) {}

    void operator()(const uint8_t *bytes, int64_t length, double *scores) {
        text.read(unicode, bytes, length);
        read();
        double words = double(this->words.size());
        scores[NUM_WORDS] = words;
        discourse_words(scores);
        scores[COHESION] = cohesion();
        scores[TYPE_TOKEN] = type_token();
        scores[LINE_WORDS] = lines ? words / double(lines) : 0.0;
        scores[SENTENCE_WORDS] = words / double(std::max<int64_t>(ends, 1));
        scores[NONSENSE] = nonsense();
        for (int i = 0; i < NUM_DISCOURSE; i++) scores[i] = std::floor(scores[i] * 1e4 + 0.5) / 1e4;
    }

  private:
    const Unicode &unicode;
    const Phrases &phrases;
    const DiscourseOptions &options;
    Characters text;
    Table table;
    std::vector<uint64_t> all;      // hashes of all units
    std::vector<uint64_t> words;    // of words only
    std::vector<uint64_t> content;  // of long words and pairs of Han characters, passage after passage
    std::vector<int64_t> passages;  // where they end in `content`
    int64_t lines = 0, ends = 0;

    static bool is_end(uint32_t p) { return p == '.' || p == '!' || p == '?' || p == 0x3002 || p == 0xff01 || p == 0xff1f; }

    void read() {
        all.clear(), words.clear(), content.clear(), passages.clear(), lines = ends = 0;
        int64_t since = 0, before_end = -1;
        uint64_t before = 0;  // the Han character before
        bool in_line = false;
        each_unit(unicode, text, [&](const Unit &unit) {
            all.push_back(unit.hash);
            bool han = text.is(unit.begin, HAN | KANA);
            if (han || text.is_word(unit.begin)) {
                words.push_back(unit.hash), since++, in_line = true;
                if (!han && unit.end - unit.begin >= 5) content.push_back(unit.hash);
                if (han && before && before_end == unit.begin) content.push_back(mixed(before * PRIME + unit.hash));
                before = han ? unit.hash : 0, before_end = unit.end;
                return;
            }
            bool sentence = is_end(text.points[unit.begin]), line = text.is(unit.begin, SPACE);
            ends += sentence;
            if (line) lines += in_line, in_line = false;
            if ((sentence || line) && since >= options.passage) passages.push_back(int64_t(content.size())), since = 0;
        });
        lines += in_line;
        if (since >= options.passage || passages.empty()) passages.push_back(int64_t(content.size()));
    }

    // The longest phrase at each place, none inside another.
    void discourse_words(double *scores) const {
        int64_t counts[3] = {0, 0, 0}, size = int64_t(all.size());
        for (int64_t i = 0; i < size;) {
            int64_t taken = 1;
            uint8_t kind = 0;
            uint64_t total = 0;
            for (int64_t n = 1; n <= phrases.longest && i + n <= size; n++) {
                total = total * PRIME + all[size_t(i + n - 1)];
                int64_t place = phrases.slots.find(mixed(total));
                if (place >= 0) taken = n, kind = phrases.classes[place];
            }
            counts[kind]++, i += taken;
        }
        double words = double(std::max<size_t>(this->words.size(), 1));
        scores[CONNECTIVES] = counts[CONNECTIVE] / words, scores[PRONOUNS] = counts[PRONOUN] / words;
    }

    // Mean over neighboring passages: what both hold, over what the smaller one holds.
    double cohesion() {
        std::vector<uint64_t> last, next, both;
        double total = 0;
        int64_t from = 0, number = 0;
        for (int64_t to : passages) {
            next.assign(content.begin() + from, content.begin() + to);
            std::sort(next.begin(), next.end());
            next.erase(std::unique(next.begin(), next.end()), next.end());
            if (number++) {
                both.clear();
                std::set_intersection(last.begin(), last.end(), next.begin(), next.end(), std::back_inserter(both));
                size_t smaller = std::min(last.size(), next.size());
                total += smaller ? double(both.size()) / double(smaller) : 0.0;
            }
            from = to, last.swap(next);
        }
        return number > 1 ? total / double(number - 1) : 0.0;
    }

    // Mean over full windows of words: how many are different, over how many there are.
    double type_token() {
        int64_t size = int64_t(words.size()), window = std::min(options.window, size), number = 0;
        double total = 0;
        if (!size) return 0.0;
        for (int64_t from = 0; from + window <= size; from += window, number++) {
            table.clear(window);
            int64_t different = 0;
            for (int64_t i = from; i < from + window; i++) different += !table.add(words[size_t(i)], 0).count++;
            total += double(different) / double(window);
        }
        return total / double(number);
    }

    // Characters in lines of which fewer than half are letters, or with a word of more than 80, over all; blanks apart.
    double nonsense() const {
        int64_t total = 0, bad = 0, size = 0, letters = 0, run = 0, longest = 0;
        for (int64_t i = 0; i <= text.size; i++) {
            if (i == text.size || text.points[i] == '\n') {
                total += size;
                if (2 * letters < size || longest > 80) bad += size;
                size = letters = run = longest = 0;
                continue;
            }
            run = text.is_word(i) && !text.is(i, HAN | KANA) ? run + 1 : 0;
            longest = std::max(longest, run);
            size += !text.is(i, SPACE), letters += text.is(i, ALPHA);
        }
        return total ? double(bad) / double(total) : 0.0;
    }
};

}  // namespace puyu
