// NVRTC of the emulator: "compiles" a kernel's source by the C++ compiler into a library, whose path is the machine code.
// The compiler is $CXX or g++; shim.h lies in EMULATOR_FOLDER, where the libraries go as well.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <unistd.h>
#include <vector>

struct Program {
    std::string source, name, log, image;
    std::vector<std::pair<std::string, std::string>> headers;
};

// Programs so far: each compiles under names of its own, since several may at once.
static std::atomic<unsigned> programs;

static std::string folder() { return EMULATOR_FOLDER; }

static void write(const std::string& path, const std::string& text) { std::ofstream(path) << text; }
static std::string read(const std::string& path) {
    std::stringstream out;
    out << std::ifstream(path).rdbuf();
    return out.str();
}

// Names of the functions that are marked __global__.
static std::vector<std::string> kernels(const std::string& source) {
    std::vector<std::string> names;
    for (size_t at = source.find("__global__"); at != std::string::npos; at = source.find("__global__", at + 1)) {
        std::string word;
        for (size_t i = at + 10; i < source.size(); i++) {
            char c = source[i];
            if (isalnum(c) || c == '_') {
                word += c;
            } else if (c == '(' && word == "__launch_bounds__") {
                for (int depth = 0; i < source.size(); i++) {
                    depth += (source[i] == '(') - (source[i] == ')');
                    if (depth == 0) break;
                }
                word.clear();
            } else if (c == '(') {
                names.push_back(word);
                break;
            } else if (c == '#' || c == '{') {
                break;
            } else {
                word.clear();
            }
        }
    }
    return names;
}

extern "C" {
int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return 0;
}
int nvrtcCreateProgram(Program** out, const char* source, const char* name, int count, const char* const* headers, const char* const* names) {
    auto program = new Program{source, name, "", "", {}};
    for (int i = 0; i < count; i++) program->headers.push_back({names[i], headers[i]});
    *out = program;
    return 0;
}
int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return 0;
}
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    std::string macros, all = program->source, text = "#include \"shim.h\"\n";
    for (int i = 0; i < count; i++) {
        if (strncmp(options[i], "-D", 2) == 0) macros += std::string(" ") + options[i];
    }
    for (auto& [name, header] : program->headers) all += header;
    std::string id = std::to_string(std::hash<std::string>()(all + macros + read(folder() + "/shim.h")));
    std::string base = folder() + "/" + program->name + "-" + id, own = base + "-" + std::to_string(getpid()) + "-" + std::to_string(programs++);
    if (access((base + ".so").c_str(), R_OK) != 0) {
        std::string headers = own + "-headers";
        if (system(("mkdir -p '" + headers + "'").c_str()) != 0) return 7;
        for (auto& [name, header] : program->headers) write(headers + "/" + name, header);
        text += "#line 1 \"" + program->name + "\"\n" + program->source;
        for (auto& name : kernels(program->source)) {
            text += "\nextern \"C\" void emu_entry_" + name + "(void** arguments) { emu_call(" + name + ", arguments); }" +
                "\nextern \"C\" int emu_keep_" + name + "(void** arguments, unsigned char* places) { return emu_keep(" + name + ", arguments, places); }";
        }
        write(own + ".cpp", text);
        const char* compiler = getenv("CXX");
        std::string command = std::string(compiler ? compiler : "g++") + " -std=c++17 -O1 -w -fPIC -shared -fno-strict-aliasing -ffp-contract=off" +
            " -DEMULATED" + macros + " -I '" + folder() + "' -I '" + headers + "' '" + own + ".cpp' -o '" + own + ".so' > '" + own + ".log' 2>&1";
        int failed = system(command.c_str());
        program->log = read(own + ".log");
        if (failed) return 6;
        rename((own + ".so").c_str(), (base + ".so").c_str());
        system(("rm -r '" + headers + "' '" + own + ".cpp' '" + own + ".log'").c_str());
    }
    program->image = base + ".so";
    return 0;
}
int nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return 0;
}
int nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) {
    *size = program->image.size() + 1;
    return 0;
}
int nvrtcGetCUBIN(Program* program, char* image) {
    memcpy(image, program->image.c_str(), program->image.size() + 1);
    return 0;
}
}
