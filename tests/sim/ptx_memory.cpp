// What PTX instructions do that touch memory, and the count of what they ask of it.
#include <algorithm>
#include <set>
#include <stdexcept>

#include "ptx_machine.h"

namespace fusedmerge::ptx {
namespace {

constexpr int kSector = 32;

struct Access {
    bool shared;
    bool writes;
    int bytes;  // of one lane
    bool counts = true;
};

[[noreturn]] void refuse(const Step& step, const std::string& what) {
    throw std::runtime_error(what + " by `" + step.instruction.text + "` in block " + std::to_string(step.warp.block->index));
}

// The host's pointer behind a shared address.
unsigned char* in_shared(Step& step, uint64_t address, int bytes) {
    const Block& block = *step.warp.block;
    uint64_t at = address - kSharedWindow;
    if (at > block.shared_bytes || block.shared_bytes - at < static_cast<uint64_t>(bytes)) refuse(step, "access beyond shared memory");
    return block.shared + at;
}

void count_global(Machine& machine, bool writes, const std::vector<std::pair<uint64_t, int>>& ranges) {
    std::set<uint64_t> sectors;
    int64_t bytes = 0;
    for (auto [first, size] : ranges) {
        bytes += size;
        for (uint64_t at = first / kSector; size > 0 && at <= (first + size - 1) / kSector; ++at) sectors.insert(at);
    }
    (writes ? machine.traffic->global_written : machine.traffic->global_read) += bytes;
    (writes ? machine.traffic->global_written_sectors : machine.traffic->global_read_sectors) += static_cast<int64_t>(sectors.size());
    (writes ? machine.written : machine.read).insert(sectors.begin(), sectors.end());
}

// Lanes are served 128 bytes at a time: 32 of 4 bytes, 16 of 8, 8 of 16. Two different words of a bank take two wavefronts.
void count_shared(Machine& machine, const std::vector<std::pair<uint64_t, int>>& ranges) {
    size_t at_once = ranges.empty() ? 1 : std::max(1, 128 / std::max(4, ranges[0].second));
    for (size_t first = 0; first < ranges.size(); first += at_once) {
        std::set<uint64_t> banks[32];
        for (size_t i = first; i < std::min(ranges.size(), first + at_once); ++i) {
            for (uint64_t word = ranges[i].first / 4; word <= (ranges[i].first + ranges[i].second - 1) / 4; ++word)
                banks[word % 32].insert(word);
        }
        size_t most = 0;
        for (const auto& words : banks) most = std::max(most, words.size());
        machine.traffic->shared_accesses += 1;
        machine.traffic->shared_conflicts += static_cast<int64_t>(most) - 1;
    }
}

void count(Step& step, const Access& access, const std::vector<std::pair<uint64_t, int>>& ranges) {
    if (access.shared) {
        count_shared(step.machine, ranges);
    } else {
        count_global(step.machine, access.writes, ranges);
    }
}

// Calls each(lane, host pointer) for the address in operand `base` plus the offset.
template <class Each>
void for_addresses(Step& step, size_t base, const Access& access, Each each) {
    bool counted = access.counts && step.machine.traffic != nullptr;
    std::vector<std::pair<uint64_t, int>> ranges;
    for_lanes(step.mask, [&](int lane) {
        uint64_t address = step.row(base).lane[lane] + static_cast<uint64_t>(step.instruction.offset);
        if (access.shared) address &= 0xffffffffu;
        if (address % access.bytes != 0) refuse(step, "misaligned access");
        if (counted) ranges.emplace_back(address, access.bytes);
        each(lane, access.shared ? in_shared(step, address, access.bytes) : reinterpret_cast<unsigned char*>(address));
    });
    if (counted) count(step, access, ranges);
}

int size_of(const std::string& type) {
    if (type == "u8" || type == "s8" || type == "b8") return 1;
    if (type == "u16" || type == "s16" || type == "b16") return 2;
    if (type == "u32" || type == "s32" || type == "b32" || type == "f32") return 4;
    if (type == "u64" || type == "s64" || type == "b64") return 8;
    throw std::runtime_error("PTX type " + type);
}

bool has(const std::vector<std::string>& parts, const std::string& part) {
    return std::find(parts.begin(), parts.end(), part) != parts.end();
}

uint64_t widened(uint64_t value, int bytes, bool is_signed) {
    if (bytes == 8) return value;
    uint64_t sign = uint64_t{1} << (8 * bytes - 1);
    return is_signed && (value & sign) ? value | ~(2 * sign - 1) : value;
}

// ld and st, of one value or a vector: registers then address, or address then registers.
Action transfer(const std::vector<std::string>& parts, bool writes) {
    int size = size_of(parts.back()), count = has(parts, "v4") ? 4 : has(parts, "v2") ? 2 : 1;
    bool is_signed = parts.back()[0] == 's';
    Access access{has(parts, "shared"), writes, size * count, !has(parts, "param")};  // of constant memory no traffic is counted
    return [=](Step& step) {
        size_t base = writes ? 0 : count, first = writes ? 1 : 0;
        for_addresses(step, base, access, [&](int lane, unsigned char* at) {
            for (int i = 0; i < count; ++i) {
                if (writes) {
                    std::memcpy(at + i * size, &step.row(first + i).lane[lane], size);
                } else {
                    uint64_t value = 0;
                    std::memcpy(&value, at + i * size, size);
                    step.row(first + i).lane[lane] = widened(value, size, is_signed);
                }
            }
        });
    };
}

// cp.async.c?.shared.global [to], [from], 16, bytes: the rest is zero. Data moves when options.async_copies says.
void copy_async(Step& step) {
    std::vector<std::pair<uint64_t, int>> read, written;
    for_lanes(step.mask, [&](int lane) {
        uint64_t to = step.row(0).lane[lane] & 0xffffffffu, from = step.row(1).lane[lane];
        int size = get<int>(step.row(2), lane), bytes = get<int>(step.row(3), lane);
        if (size != 16 || bytes < 0 || bytes > size || (to | from) % size != 0)
            refuse(step, "misaligned asynchronous copy, or one of a wrong size");
        sim::Copy copy{in_shared(step, to, size), reinterpret_cast<const void*>(from), size, bytes};
        read.emplace_back(from, bytes);
        written.emplace_back(to, size);
        int when = step.machine.options.async_copies;
        bool early = when == static_cast<int>(sim::AsyncCopies::kEarly) ||
                     (when == static_cast<int>(sim::AsyncCopies::kRandom) && step.machine.random() % 2);
        if (early) {
            sim::perform(copy);
        } else {
            step.warp.copies[lane].open.push_back(copy);
        }
    });
    if (step.machine.traffic == nullptr) return;
    count(step, {false, false, 16}, read);
    count(step, {true, true, 16}, written);
}

void commit(Step& step) {
    for_lanes(step.mask, [&](int lane) {
        LaneCopies& copies = step.warp.copies[lane];
        copies.groups.push_back(std::move(copies.open));
        copies.open.clear();
    });
}

void wait(Step& step) {
    for_lanes(step.mask, [&](int lane) {
        auto& groups = step.warp.copies[lane].groups;
        while (static_cast<int64_t>(groups.size()) > get<int64_t>(step.row(0), lane)) {
            for (const sim::Copy& copy : groups.front()) sim::perform(copy);
            groups.pop_front();
        }
    });
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d0, d1, d2, d3}, [row]
void load_matrices(Step& step) {
    const unsigned char* rows[kLanes];
    for_addresses(step, 4, {true, false, 16}, [&](int lane, unsigned char* at) { rows[lane] = at; });
    for_lanes(step.mask, [&](int lane) {
        for (int i = 0; i < 4; ++i) {
            uint32_t word;
            std::memcpy(&word, rows[8 * i + lane / 4] + lane % 4 * 4, 4);
            set(step.row(i), lane, word);
        }
    });
}

Action atomic(bool adds) {
    return [adds](Step& step) {
        for_addresses(step, 1, {false, true, 4}, [&](int lane, unsigned char* at) {
            uint32_t old, value = get<uint32_t>(step.row(2), lane);
            std::memcpy(&old, at, 4);
            value = adds ? old + value : old | value;
            std::memcpy(at, &value, 4);
            set(step.row(0), lane, old);
        });
        step.machine.paused = true;
    };
}

// cvta: generic addresses are the host's, and shared memory has a window of its own.
Action convert_address(const std::string& what) {
    if (what == "cvta.to.global.u64" || what == "cvta.param.u64" || what == "cvta.global.u64") {
        return [](Step& step) { for_lanes(step.mask, [&](int lane) { step.row(0).lane[lane] = step.row(1).lane[lane]; }); };
    }
    if (what == "cvta.shared.u64") {
        return
            [](Step& step) { for_lanes(step.mask, [&](int lane) { set(step.row(0), lane, in_shared(step, step.row(1).lane[lane], 0)); }); };
    }
    return nullptr;
}

}  // namespace

bool decode_memory(const std::vector<std::string>& parts, Instruction& instruction) {
    std::string name;
    for (const std::string& part : parts) name += (name.empty() ? "" : ".") + part;
    if (parts[0] == "ld" || parts[0] == "st") {
        if (has(parts, "local")) return false;
        instruction.action = transfer(parts, parts[0] == "st");
    } else if (name == "cp.async.commit_group") {
        instruction.action = commit;
    } else if (name == "cp.async.wait_group") {
        instruction.action = wait;
    } else if (name.compare(0, 9, "cp.async.") == 0 && parts.size() > 4 && parts[3] == "shared" && parts[4] == "global") {
        instruction.action = copy_async;
    } else if (name == "ldmatrix.sync.aligned.m8n8.x4.shared.b16") {
        instruction.kind = Kind::kTogether;
        instruction.action = load_matrices;
    } else if (parts[0] == "atom" && has(parts, "global") && (has(parts, "add") || has(parts, "or")) && size_of(parts.back()) == 4) {
        instruction.action = atomic(has(parts, "add"));
    } else if (parts[0] == "cvta") {
        instruction.action = convert_address(name);
    }
    return static_cast<bool>(instruction.action);
}

}  // namespace fusedmerge::ptx
