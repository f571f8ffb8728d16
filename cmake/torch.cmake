# torch's headers and its libtorch.so, found without importing torch (which takes seconds and may need a GPU driver).
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
if(DEFINED ENV{LUNGKIT_TORCH_DIR} AND NOT DEFINED LUNGKIT_TORCH_DIR)
  set(LUNGKIT_TORCH_DIR $ENV{LUNGKIT_TORCH_DIR})
endif()
if(NOT LUNGKIT_TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util, os; s = importlib.util.find_spec('torch'); print(os.path.dirname(s.origin) if s else '', end='')"
    OUTPUT_VARIABLE LUNGKIT_TORCH_DIR COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${LUNGKIT_TORCH_DIR}/include/torch/headeronly/version.h")
  message(FATAL_ERROR "lungkit: no torch >= ${LUNGKIT_OLDEST_TORCH} found (looked in '${LUNGKIT_TORCH_DIR}'); "
                      "install torch first or set LUNGKIT_TORCH_DIR")
endif()

file(READ "${LUNGKIT_TORCH_DIR}/include/torch/headeronly/version.h" version_header)
string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _ "${version_header}")
set(torch_major ${CMAKE_MATCH_1})
string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _ "${version_header}")
set(torch_minor ${CMAKE_MATCH_1})
set(LUNGKIT_TORCH_VERSION "${torch_major}.${torch_minor}")
if(LUNGKIT_TORCH_VERSION VERSION_LESS LUNGKIT_OLDEST_TORCH)
  message(FATAL_ERROR "lungkit: torch ${LUNGKIT_TORCH_VERSION} at ${LUNGKIT_TORCH_DIR} is older than ${LUNGKIT_OLDEST_TORCH}")
endif()
# A build for the CPU says `cuda: Optional[str] = None`.
set(LUNGKIT_TORCH_HAS_CUDA TRUE)
if(EXISTS "${LUNGKIT_TORCH_DIR}/version.py")
  file(STRINGS "${LUNGKIT_TORCH_DIR}/version.py" without_cuda REGEX "^cuda[^=]*= *None")
  if(without_cuda)
    set(LUNGKIT_TORCH_HAS_CUDA FALSE)
  endif()
endif()
message(STATUS "lungkit: headers of torch ${LUNGKIT_TORCH_VERSION} at ${LUNGKIT_TORCH_DIR}")

# TORCH_TARGET_VERSION keeps the code to what the oldest promised torch already has.
string(REPLACE "." ";" oldest ${LUNGKIT_OLDEST_TORCH})
list(GET oldest 0 oldest_major)
list(GET oldest 1 oldest_minor)
math(EXPR torch_target "(${oldest_major} << 56) | (${oldest_minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${LUNGKIT_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${torch_target}ULL)
# torch opens its own libraries RTLD_LOCAL, so ours must name libtorch.so as needed to see the C shims. libtorch.so
# itself is empty and pulls in libtorch_cpu.so and, in CUDA builds of torch, libtorch_cuda.so.
target_link_libraries(torch_stable INTERFACE "-Wl,--push-state,--no-as-needed" "${LUNGKIT_TORCH_DIR}/lib/libtorch.so"
                                             "-Wl,--pop-state")
