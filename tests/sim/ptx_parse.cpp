// Reads PTX: text -> instructions with numbered registers.
#include <cxxabi.h>

#include <cctype>
#include <cstdlib>
#include <stdexcept>

#include "ptx.h"
#include "ptx_machine.h"

namespace fusedmerge::ptx {
namespace {

std::string without_comments(const std::string& text) {
    std::string kept;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text.compare(i, 2, "//") == 0) {
            i = text.find('\n', i);
        } else if (text.compare(i, 2, "/*") == 0) {
            i = text.find("*/", i) + 1;
            continue;
        }
        if (i >= text.size()) break;
        kept += text[i];
    }
    return kept;
}

std::string trimmed(const std::string& text) {
    size_t first = text.find_first_not_of(" \t\n");
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
}

std::string demangled(const std::string& symbol) {
    int status = 0;
    char* name = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
    std::string result = status == 0 ? name : symbol;
    std::free(name);
    return result;
}

bool is_called(const std::string& symbol, const std::string& name) {
    return demangled(symbol).find("::" + name + "(") != std::string::npos;
}

class Parser {
  public:
    explicit Parser(const std::string& entry) : text_(entry) {
        for (const char* name : {"%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "<param>", "_"}) declare(name);  // "_": not wanted
    }

    Program run(size_t body) {
        at_ = body;
        int depth = 0;
        scopes_.emplace_back();
        while (true) {
            skip_space();
            if (at_ >= text_.size()) throw std::runtime_error("PTX ends within a kernel");
            if (text_[at_] == '{') {
                ++at_, ++depth;
                scopes_.emplace_back();
            } else if (text_[at_] == '}') {
                ++at_, --depth;
                scopes_.pop_back();
                if (depth == 0) break;
            } else {
                statement();
            }
        }
        for (auto& [index, label] : branches_) {
            if (labels_.count(label) == 0) throw std::runtime_error("PTX without the label " + label);
            program_.code[index].target = labels_[label];
        }
        program_.num_registers = num_registers_;
        return std::move(program_);
    }

  private:
    void skip_space() {
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    }

    int declare(const std::string& name) { return scopes_.back()[name] = num_registers_++; }

    int register_of(const std::string& name) {
        for (size_t i = scopes_.size(); i-- > 0;) {
            auto found = scopes_[i].find(name);
            if (found != scopes_[i].end()) return found->second;
        }
        size_t digits = name.find_last_not_of("0123456789") + 1;
        auto range = ranges_.find(name.substr(0, digits));
        if (range == ranges_.end() || digits == name.size() || std::stoi(name.substr(digits)) >= range->second) {
            throw std::runtime_error("PTX register " + name);
        }
        return scopes_.front()[name] = num_registers_++;
    }

    int constant(uint64_t value) {
        auto [found, is_new] = constants_.try_emplace(value, num_registers_);
        if (is_new) program_.constants.push_back({num_registers_++, value});
        return found->second;
    }

    void statement() {
        size_t end = text_.find_first_of(";:", at_);
        while (text_[end] == ':' && text_.compare(end, 2, "::") == 0) end = text_.find_first_of(";:", end + 2);  // ".L2::cache_hint"
        std::string line = trimmed(text_.substr(at_, end - at_));
        bool is_label = text_[end] == ':';
        at_ = end + 1;
        if (is_label) {
            labels_[line] = static_cast<int>(program_.code.size());
        } else if (line[0] == '.') {
            directive(line);
        } else {
            instruction(line);
        }
    }

    void directive(const std::string& line) {
        if (line.compare(0, 7, ".pragma") == 0) return;
        if (line.compare(0, 4, ".reg") != 0) throw std::runtime_error("PTX directive " + line);
        size_t names = line.find_first_of(" \t", line.find('.', 1)), count = line.find('<');
        if (count != std::string::npos) {  // a range, whose registers are numbered at first use
            ranges_[trimmed(line.substr(names, count - names))] = std::stoi(line.substr(count + 1));
            return;
        }
        for (const std::string& name : split(line.substr(names))) declare(name);
    }

    // At commas; braces and brackets are kept for `operand`.
    static std::vector<std::string> split(const std::string& list) {
        std::vector<std::string> parts;
        std::string part;
        int depth = 0;
        for (char c : list) {
            depth += (c == '{' || c == '[') - (c == '}' || c == ']');
            if (c == ',' && depth == 0) {
                parts.push_back(trimmed(part));
                part.clear();
            } else {
                part += c;
            }
        }
        if (!trimmed(part).empty()) parts.push_back(trimmed(part));
        return parts;
    }

    void instruction(std::string line) {
        Instruction made;
        made.text = line;
        if (line[0] == '@') {
            made.guard_negated = line[1] == '!';
            size_t end = line.find_first_of(" \t");
            made.guard = register_of(line.substr(1 + made.guard_negated, end - 1 - made.guard_negated));
            line = trimmed(line.substr(end));
        }
        size_t end = line.find_first_of(" \t\n");
        std::string opcode = line.substr(0, end);
        std::vector<std::string> operands = end == std::string::npos ? std::vector<std::string>{} : split(line.substr(end));
        if (opcode.compare(0, 3, "bra") == 0) {
            made.kind = Kind::kBranch;
            branches_.emplace_back(program_.code.size(), operands.at(0));
        } else {
            bool is_barrier = opcode == "bar.sync" || opcode.compare(0, 7, "bar.red") == 0;
            if (is_barrier &&
                operands.at(opcode == "bar.sync" ? 0 : 1) + std::to_string(operands.size()) != (opcode == "bar.sync" ? "01" : "03")) {
                throw std::runtime_error("PTX barrier " + line);
            }
            for (const std::string& text : operands) operand(text, made);
            decode(opcode, made);
        }
        program_.code.push_back(std::move(made));
    }

    void operand(const std::string& text, Instruction& made) {
        if (text[0] == '{') {
            for (const std::string& part : split(text.substr(1, text.size() - 2))) operand(part, made);
        } else if (text[0] == '[') {
            std::string inner = trimmed(text.substr(1, text.size() - 2));
            size_t plus = inner.find('+');
            if (plus != std::string::npos) made.offset = std::stoll(inner.substr(plus + 1));
            operand(trimmed(inner.substr(0, plus)), made);
        } else {
            made.registers.push_back(value(text));
        }
    }

    int value(const std::string& text) {
        if (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0d") == 0) return constant(std::strtoull(text.c_str() + 2, nullptr, 16));
        if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
            if (text.find('.') != std::string::npos) return constant(0);  // a policy's share: not modelled
            return constant(static_cast<uint64_t>(std::stoll(text, nullptr, 0)));
        }
        if (text.find("_param_") != std::string::npos) return kParam;
        if (text.find("shared_bytes") != std::string::npos) return constant(kSharedWindow);
        return register_of(text);
    }

    const std::string& text_;
    size_t at_ = 0;
    Program program_;
    int num_registers_ = 0;
    std::vector<std::map<std::string, int>> scopes_{1};
    std::map<std::string, int> ranges_;
    std::map<uint64_t, int> constants_;
    std::map<std::string, int> labels_;
    std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace

Program parse(const std::string& whole, const std::string& name) {
    std::string text = without_comments(whole);
    std::vector<size_t> bodies, found;
    for (size_t at = text.find(".entry"); at != std::string::npos; at = text.find(".entry", at + 1)) {
        size_t begin = text.find_first_not_of(" \t", at + 6);
        std::string symbol = trimmed(text.substr(begin, text.find('(', begin) - begin));
        bodies.push_back(text.find('{', at));
        if (is_called(symbol, name)) found.push_back(bodies.back());
    }
    if (found.empty() && bodies.size() == 1) found = bodies;
    if (found.size() != 1) throw std::runtime_error("PTX with " + std::to_string(found.size()) + " kernels called " + name);
    return Parser(text).run(found[0]);
}

}  // namespace fusedmerge::ptx
