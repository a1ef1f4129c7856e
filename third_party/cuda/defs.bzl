"""cuda_library: .cu files by nvcc, .cc files by the host compiler, one library."""

NVCC = "/usr/local/cuda/bin/nvcc"
FLAGS = [
    "-std=c++20",
    "-O3",
    # sm_90a: the target that has wgmma. Nothing older: this backend is written for Hopper.
    "-gencode=arch=compute_90a,code=sm_90a",
    "-lineinfo",
    "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-unused-parameter",
    "-I.",
]

def cuda_library(name, srcs, hdrs, deps = [], nvcc_flags = {}, nvcc_inputs = [], copts = [], **kwargs):
    """A library for --config=cuda; tagged manual, since a build without CUDA has no nvcc.

    Args:
      srcs: .cu files (compiled by nvcc, an action each) and .cc files.
      hdrs: headers; .cuh files are for the .cu files only.
      nvcc_flags: {file.cu: [more flags]}.
      nvcc_inputs: labels of other headers that the .cu files include.
    """
    objects = []
    for src in [s for s in srcs if s.endswith(".cu")]:
        out = src[:-3] + ".cu.o"
        native.genrule(
            name = name + "_" + src[:-3],
            srcs = [src] + hdrs + nvcc_inputs,
            outs = [out],
            cmd = " ".join([NVCC] + FLAGS + nvcc_flags.get(src, []) + ["-c $(location " + src + ") -o $@"]),
            message = "Compiling CUDA",
            tags = ["manual"],
        )
        objects.append(out)
    native.cc_library(
        name = name,
        srcs = objects + [s for s in srcs if s.endswith(".cc")],
        hdrs = [h for h in hdrs if h.endswith(".h")],
        copts = copts,
        tags = ["manual"],
        deps = deps + [
            "//third_party/cuda:cudart",
            "@cuda_toolkit//:headers",
        ],
        **kwargs
    )
