# lungkit_cpu.so, lungkit_cuda.so and, for the tests, lungkit_emulated.so. An op is a folder csrc/<op>/ with cpu.cpp
# (registration), kernel_cpu.cpp (compiled once for each instruction set) and cuda.cu; naming it here is all it takes.
set(LUNGKIT_OPS attention_gate confusion_counts dice_ce gate_tail norm_act)

set(csrc ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
list(TRANSFORM LUNGKIT_OPS PREPEND ${csrc}/ OUTPUT_VARIABLE op_folders)
list(TRANSFORM op_folders APPEND /cpu.cpp OUTPUT_VARIABLE cpu_sources)
list(TRANSFORM op_folders APPEND /kernel_cpu.cpp OUTPUT_VARIABLE kernel_sources)
list(TRANSFORM op_folders APPEND /cuda.cu OUTPUT_VARIABLE cuda_sources)

set(warnings -Wall -Wextra -Wno-unknown-pragmas)
# A report of the sanitizers ends the process. They want the frame pointer, and -O1 compiles in a third of the time.
set(sanitize $<$<BOOL:${LUNGKIT_SANITIZE}>:-fsanitize=address,undefined>)
set(sanitize_compile ${sanitize} $<$<BOOL:${LUNGKIT_SANITIZE}>:-fno-sanitize-recover=all;-fno-omit-frame-pointer;-O1;-g1>)

function(lungkit_place_library target)
  set_target_properties(${target} PROPERTIES PREFIX "" SKIP_BUILD_RPATH ON)
  if(LUNGKIT_IN_PLACE OR SKBUILD_STATE STREQUAL "editable")
    set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/lungkit/_native)
  endif()
  install(TARGETS ${target} DESTINATION lungkit/_native)
endfunction()

# No global fast-math: a loop asks for reassociation where it wants it (omp simd), and only there.
set(kernel_flags -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math ${warnings})

function(lungkit_add_kernels isa)
  add_library(kernels_${isa} OBJECT ${kernel_sources})
  target_include_directories(kernels_${isa} SYSTEM PRIVATE ${LUNGKIT_TORCH_DIR}/include)
  target_compile_definitions(kernels_${isa} PRIVATE LUNGKIT_ISA=${isa} $<$<BOOL:${LUNGKIT_X86}>:LUNGKIT_X86_KERNELS>)
  target_compile_options(kernels_${isa} PRIVATE ${kernel_flags} ${ARGN} ${sanitize_compile})
  target_sources(lungkit_cpu PRIVATE $<TARGET_OBJECTS:kernels_${isa}>)
endfunction()

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
if(processor MATCHES "^(x86_64|amd64)$")
  set(LUNGKIT_X86 ON)
endif()

add_library(lungkit_cpu MODULE ${csrc}/library.cpp ${csrc}/support/isa.cpp ${cpu_sources})
target_link_libraries(lungkit_cpu PRIVATE torch_stable)
target_compile_definitions(lungkit_cpu PRIVATE $<$<BOOL:${LUNGKIT_X86}>:LUNGKIT_X86_KERNELS>)
target_compile_options(lungkit_cpu PRIVATE ${warnings} ${sanitize_compile})
target_link_options(lungkit_cpu PRIVATE ${sanitize})
lungkit_place_library(lungkit_cpu)
lungkit_add_kernels(baseline)
if(LUNGKIT_X86)
  lungkit_add_kernels(avx2 -march=x86-64-v3)
  lungkit_add_kernels(avx512 -march=x86-64-v4 -mprefer-vector-width=512)
endif()

# The geometry module works on numpy arrays and knows nothing of torch; without Python's headers numpy does its work.
find_package(Python 3.10 COMPONENTS Interpreter Development.Module)
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_folder
                OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
unset(pybind11_DIR CACHE) # of a build environment that may be gone
find_package(pybind11 2.13 CONFIG HINTS ${pybind11_folder})
if(Python_Development.Module_FOUND AND pybind11_FOUND AND EXISTS ${csrc}/geometry)
  # From a folder of our own: that of an isolated build environment has another name each time, which would have the
  # module compiled anew.
  set(headers ${CMAKE_CURRENT_BINARY_DIR}/headers)
  file(GLOB_RECURSE pybind11_headers RELATIVE ${pybind11_INCLUDE_DIR} ${pybind11_INCLUDE_DIR}/pybind11/*.h)
  foreach(header ${pybind11_headers})
    get_filename_component(folder ${header} DIRECTORY)
    file(MAKE_DIRECTORY ${headers}/${folder})
    file(COPY_FILE ${pybind11_INCLUDE_DIR}/${header} ${headers}/${header} ONLY_IF_DIFFERENT)
  endforeach()
  file(GLOB geometry_sources CONFIGURE_DEPENDS ${csrc}/geometry/*.cpp)
  find_package(Threads REQUIRED)
  python_add_library(_geometry MODULE WITH_SOABI ${geometry_sources})
  target_include_directories(_geometry SYSTEM PRIVATE ${headers})
  target_link_libraries(_geometry PRIVATE Threads::Threads)
  target_compile_options(_geometry PRIVATE ${kernel_flags} ${sanitize_compile})
  target_link_options(_geometry PRIVATE ${sanitize})
  lungkit_place_library(_geometry)
else()
  message(STATUS "lungkit: no Python headers or no pybind11, so surface distances are computed in numpy")
endif()

if(LUNGKIT_HAVE_CUDA)
  add_library(lungkit_cuda MODULE ${cuda_sources})
  target_link_libraries(lungkit_cuda PRIVATE torch_stable)
  target_compile_definitions(lungkit_cuda PRIVATE USE_CUDA)
  target_compile_options(
    lungkit_cuda PRIVATE --expt-relaxed-constexpr --extended-lambda -lineinfo -Xfatbin=-compress-all
                         -Xcompiler=-fvisibility=hidden,-Wall)
  set_target_properties(lungkit_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  lungkit_place_library(lungkit_cuda)
endif()

if(LUNGKIT_EMULATOR)
  if(LUNGKIT_HAVE_CUDA)
    message(FATAL_ERROR "lungkit: LUNGKIT_EMULATOR compiles the .cu files with the C++ compiler; add -DLUNGKIT_CUDA=OFF")
  endif()
  set(emulator ${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda_on_cpu)
  set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX)
  add_library(lungkit_emulated MODULE ${csrc}/library.cpp ${cuda_sources})
  target_link_libraries(lungkit_emulated PRIVATE torch_stable)
  target_compile_definitions(lungkit_emulated PRIVATE LUNGKIT_EMULATE=lungkit_emulated)
  target_compile_options(
    lungkit_emulated PRIVATE -x c++ -include ${emulator}/cuda_on_cpu.h -O2 -g1 -Wall ${sanitize}
                             $<$<BOOL:${LUNGKIT_SANITIZE}>:-fno-sanitize-recover=all>)
  target_link_options(lungkit_emulated PRIVATE ${sanitize})
  set_target_properties(lungkit_emulated PROPERTIES PREFIX "")

  # The same, counting what kernels do (tests/cuda_on_cpu/counting.h): a line runs as often as the source says at -O0 only.
  add_library(lungkit_counted MODULE EXCLUDE_FROM_ALL ${csrc}/library.cpp ${cuda_sources})
  target_link_libraries(lungkit_counted PRIVATE torch_stable counting)
  target_compile_definitions(lungkit_counted PRIVATE LUNGKIT_EMULATE=lungkit_counted LUNGKIT_EMULATOR_COUNTS=1)
  target_compile_options(lungkit_counted PRIVATE -x c++ -include ${emulator}/cuda_on_cpu.h -O0 -g1 -w --coverage
                                                 -fsanitize=thread --param tsan-instrument-func-entry-exit=0)
  target_link_options(lungkit_counted PRIVATE --coverage)
  set_target_properties(lungkit_counted PROPERTIES PREFIX "")
  add_library(counting OBJECT EXCLUDE_FROM_ALL ${emulator}/counting.cpp)
  target_compile_definitions(counting PRIVATE LUNGKIT_EMULATOR_COUNTS=1)
  target_compile_options(counting PRIVATE -O2 -Wall)
endif()
