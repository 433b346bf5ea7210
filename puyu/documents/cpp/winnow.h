// Fingerprints of a text by winnowing (Schleimer, Wilkerson and Aiken, 2003): of every `window` k-grams of units in a row
// the smallest hash, the last one of equals.

#pragma once

#include "units.h"

namespace puyu {

// f(hash, place) of each fingerprint, by place; a place is the unit where the k-gram begins.
template <typename F>
inline void winnow(const std::vector<uint64_t> &grams, int64_t window, const F &f) {
    int64_t count = int64_t(grams.size()), last = -1, best = -1;
    for (int64_t end = window; end <= count; end++) {
        if (best < end - window) {  // it has left the window: look again
            best = end - window;
            for (int64_t i = best + 1; i < end; i++)
                if (grams[i] <= grams[best]) best = i;
        } else if (grams[end - 1] <= grams[best]) {
            best = end - 1;
        }
        if (best != last) f(grams[best], best), last = best;
    }
}

}  // namespace puyu
