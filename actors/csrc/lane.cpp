// What is done with the words and bytes of two rings, one each way; ring.hpp says why no wake-up is lost.
#include "lane.hpp"

#include <unistd.h>

#include <algorithm>

namespace {

constexpr uint64_t MAX_HELD_SHARE = 4;  // a larger part of a ring is not kept waiting for its reader

void wake(int event_fd) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(event_fd, &one, sizeof one);  // a full counter wakes as well
}

// Whether enough is free to be worth a wake-up.
bool has_room(uint64_t written, uint64_t read, uint64_t size) {
    return written == read || size - (written - read) >= size / 4;
}

}  // namespace

bool Outgoing::collect_room() {
    const uint64_t read = words->read.load(std::memory_order_acquire);
    if (read < freed || read > announced) return false;
    freed = read;
    if (freed == written) origin = freed;
    return true;
}

void Outgoing::announce() {
    if (written == announced) return;
    announced = written;
    words->origin.store(origin, std::memory_order_relaxed);
    words->written.store(written, std::memory_order_release);
    full_fence();
    if (words->asleep.load(std::memory_order_relaxed)) wake(data_fd);
}

uint64_t Outgoing::write(const char* data, uint64_t num_bytes) {
    uint64_t done = 0;
    while (done < num_bytes) {
        if (!room()) {
            announce();
            if (!collect_room() || !room()) break;
        }
        const uint64_t at = place(), part = std::min({num_bytes - done, room(), ANNOUNCE_BYTES, size - at});
        std::memcpy(bytes + at, data + done, part);
        written += part;
        done += part;
        if (written - announced >= ANNOUNCE_BYTES) announce();
    }
    return done;
}

bool Outgoing::watch_room(bool wanted) {
    words->wants_room.store(wanted, std::memory_order_relaxed);
    full_fence();
    return wanted && has_room(written, words->read.load(std::memory_order_acquire), size);
}

bool Incoming::look() {
    const uint64_t written = words->written.load(std::memory_order_acquire);
    if (written == arrived) return true;
    if (written - read > size || written < arrived) return false;
    if (read == arrived) origin = words->origin.load(std::memory_order_relaxed);  // it moves only when all has been read
    arrived = written;
    return true;
}

void Incoming::consume(uint64_t num_bytes) {
    read += num_bytes;
    words->seen.store(read, std::memory_order_relaxed);
    if (!num_held) give_back();
}

bool Incoming::hold(uint64_t num_bytes) {
    if (num_bytes > size / MAX_HELD_SHARE || num_held == MAX_HELD) return false;
    held[num_held++] = read;
    consume(num_bytes);
    return true;
}

void Incoming::let_go(uint64_t start) {
    uint64_t* const end = held + num_held;
    uint64_t* const found = std::find(held, end, start);
    if (found == end) return;
    std::copy(found + 1, end, found);
    --num_held;
    give_back();
}

void Incoming::give_back() {
    words->read.store(num_held ? held[0] : read, std::memory_order_release);
    full_fence();
    if (!words->wants_room.load(std::memory_order_relaxed)) return;
    const uint64_t written = words->written.load(std::memory_order_relaxed);
    // Told once for what was written last: a producer that got the word writes at least a byte before it waits again.
    if (written == words->woken_for || !has_room(written, num_held ? held[0] : read, size)) return;
    words->woken_for = written;
    wake(room_fd);
}

char* put_head(char* to, uint16_t kind, uint32_t meta_len, uint64_t payload_len) {
    put(to, 'B');
    put(to, 'r');
    put(to, uint8_t{1});
    put(to, uint8_t{0});
    put(to, kind);
    put(to, meta_len);
    put(to, payload_len);
    return to;
}

Head head_of(Lane& lane, uint16_t kind, uint32_t meta_len, Frame& frame) {
    if (!lane.is_open || lane.is_hung) return Head::other;
    Incoming& in = lane.in;
    if (!in.look()) return Head::other;
    if (!in.num_bytes()) return Head::none;
    if (lane.is_cut) return Head::other;
    const uint64_t place = in.place(), end = std::min(place + in.num_bytes(), in.size);
    if (end - place < FRAME_BYTES + meta_len) return Head::other;
    const char* from = in.bytes + place;
    if (std::memcmp(from, "Br\x01", 3) != 0) return Head::other;
    from += 4;
    frame.kind = take<uint16_t>(from);
    frame.meta_len = take<uint32_t>(from);
    frame.payload_len = take<uint64_t>(from);
    if (frame.kind != kind || frame.meta_len != meta_len) return Head::other;
    if (frame.payload_len > end - place - FRAME_BYTES - meta_len) return Head::other;
    frame.meta = from;
    frame.payload = from + meta_len;
    frame.start = place + FRAME_BYTES + meta_len;
    return Head::whole;
}
