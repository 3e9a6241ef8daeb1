# Read by CMake behind llama.cpp's project(), while llama-cpp-python is built (make peers).
# Its chat parsers and download code are half of the compile time, and nothing here calls them.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
