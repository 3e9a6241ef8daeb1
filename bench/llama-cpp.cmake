# Read by CMake behind llama.cpp's project(), while llama-cpp-python is built (make peers).
# Its chat parsers and download code are half of the compile time, and nothing here calls them.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
# Built for any processor (LLAMA_NATIVE=OFF) it is for tests, which it computes next to nothing in: optimizing it
# takes as long as compiling it.
if(NOT GGML_NATIVE)
  set(CMAKE_C_FLAGS_RELEASE -O1)
  set(CMAKE_CXX_FLAGS_RELEASE -O1)
endif()
