// One end of a link over two rings: where it writes, where it reads, and how far it has come in both.
//
// Every function runs with the GIL and is done when it returns, so that threads need no other lock between them.
#pragma once
#include "arguments.hpp"
#include "ring.hpp"

#include <cstring>

constexpr uint64_t ANNOUNCE_BYTES = 256 << 10;  // a large message is told of in pieces: both sides copy at the same time

struct Outgoing {
    Header* words;
    char* bytes;
    uint64_t size;
    int data_fd;
    uint64_t written, announced, freed, origin;  // bytes since the ring was made; byte n lies at (n - origin) % size

    uint64_t place() const { return (written - origin) % size; }
    uint64_t room() const { return size - (written - freed); }
    bool collect_room();  // what has been read since; false if the peer claims to have read what was never written
    uint64_t write(const char* data, uint64_t num_bytes);  // how many found room; not announced to the last
    void announce();
    bool watch_room(bool wanted);  // asks the reader to tell of room; true if there is some already
};

struct Incoming {
    static constexpr int MAX_HELD = 64;

    Header* words;
    const char* bytes;
    uint64_t size;
    int room_fd;
    uint64_t read, arrived, origin;
    int num_held;
    uint64_t held[MAX_HELD];  // where it begins what was read and is still needed; ascending

    uint64_t place() const { return (read - origin) % size; }
    uint64_t num_bytes() const { return arrived - read; }
    bool look();  // takes note of what has arrived; false if that cannot be
    void consume(uint64_t num_bytes);
    bool hold(uint64_t num_bytes);  // like consume, but they stay where they are; false, and nothing done, if too many
    void let_go(uint64_t start);    // what was held from there on
    void give_back();
};

struct Lane {
    PyObject_HEAD
    Outgoing out;
    Incoming in;
    Py_buffer out_memory, in_memory;
    uint64_t reserved;  // bytes behind `written` that somebody fills and will commit
    int num_pins;       // calls under way that look at the words without the GIL
    char is_open;
    char is_hung;    // no more is to be written, and what comes is for the slower ways
    char is_behind;  // something queues for room: whoever has more to write queues behind it
    char is_cut;     // a frame is being read in parts

    bool is_clear() const { return is_open && !is_hung && !is_behind && !reserved; }
};

extern PyTypeObject* lane_type;

// A frame as framing.py lays it out.
constexpr size_t FRAME_BYTES = 18;

struct Frame {
    uint16_t kind;
    uint32_t meta_len;
    uint64_t payload_len;
    const char* meta;
    const char* payload;
    uint64_t start;  // of the payload in the ring
    uint64_t num_bytes() const { return FRAME_BYTES + meta_len + payload_len; }
};

char* put_head(char* to, uint16_t kind, uint32_t meta_len, uint64_t payload_len);

enum class Head { none, whole, other };

// What stands at the beginning of what has arrived: a whole frame of this kind in one piece, or what is for slower ways.
Head head_of(Lane& lane, uint16_t kind, uint32_t meta_len, Frame& frame);

// The lanes of a tuple, None being none at all. Pinned: nobody unmaps them while the GIL is away.
class Lanes {
  public:
    explicit Lanes(PyObject* tuple);
    ~Lanes();
    Lanes(const Lanes&) = delete;
    Lanes& operator=(const Lanes&) = delete;

    bool is_sound() const { return is_sound_; }
    Py_ssize_t size() const { return size_; }
    Lane* operator[](Py_ssize_t index) const { return lanes_[index]; }

  private:
    static constexpr Py_ssize_t MOST = 1024;
    Lane* lanes_[MOST];
    Py_ssize_t size_ = 0;
    bool is_sound_ = false;
};

template <class T>
void put(char*& to, T value) {
    std::memcpy(to, &value, sizeof value);
    to += sizeof value;
}

template <class T>
T take(const char*& from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    from += sizeof value;
    return value;
}
