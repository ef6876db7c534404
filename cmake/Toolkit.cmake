# Finds the compiler of the images: nvcc, the assembler ptxas, and what their versions mean for users' drivers.
#
# By default both come from PyPI (the build requirements of pyproject.toml): nvcc of CUDA 13.0, which compiles to PTX,
# and ptxas of CUDA 12.9, as machine code assembled by ptxas 13 loads on drivers >= 580 only, by ptxas 12 on >= 525.
# With MLA_SYSTEM_CUDA both come from one installed toolkit: $CUDACXX, $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda.
#
# Sets MLA_NVCC, MLA_FATBINARY, MLA_PTXAS_PATH, MLA_CUDA_ROOT, MLA_NVCC_VERSION, MLA_PTXAS_VERSION, MLA_COMPILER_ORIGIN,
# MLA_MIN_DRIVER (525) and MLA_MIN_CUDA (12000: what such a driver reports).
include_guard(GLOBAL)

# The full path of site-packages/nvidia/<file>, empty when there is none. No search by CMake: only Python knows the
# search path that pip, uv or a plain virtual environment gave this build.
function(mla_find_in_nvidia_packages file out)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c [[
import pathlib, sys
try:
    import nvidia
except ImportError:
    sys.exit()
found = [p for p in (pathlib.Path(root, sys.argv[1]) for root in nvidia.__path__) if p.is_file()]
print(found[0] if found else "", end="")
]] "${file}"
    OUTPUT_VARIABLE path COMMAND_ERROR_IS_FATAL ANY)
  set(${out} "${path}" PARENT_SCOPE)
endfunction()

function(mla_tool_version tool out)
  execute_process(COMMAND "${tool}" --version OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
  if(NOT text MATCHES "V([0-9]+\\.[0-9]+\\.[0-9]+)")
    message(FATAL_ERROR "cannot tell the version of ${tool}:\n${text}")
  endif()
  set(${out} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

if(MLA_SYSTEM_CUDA)
  set(MLA_COMPILER_ORIGIN system)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(MLA_NVCC "$ENV{CUDACXX}")
  else()
    find_program(MLA_NVCC nvcc NO_CACHE HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS /usr/local/cuda/bin)
  endif()
  if(NOT MLA_NVCC)
    message(FATAL_ERROR "MLA_SYSTEM_CUDA is set, but there is no nvcc: set CUDACXX or CUDA_HOME, or put nvcc on the "
      "PATH.")
  endif()
else()
  set(MLA_COMPILER_ORIGIN pypi)
  mla_find_in_nvidia_packages(cu13/bin/nvcc MLA_NVCC)
  if(NOT MLA_NVCC)
    message(FATAL_ERROR "nvidia-cuda-nvcc is not installed for ${Python_EXECUTABLE}. Either let pip install the build "
      "requirements (pip install .), or set MLA_SYSTEM_CUDA=1 to compile with an installed toolkit.")
  endif()
endif()
mla_tool_version("${MLA_NVCC}" MLA_NVCC_VERSION)

# nvcc may be a wrapper script or a link, so it is asked for its own root.
execute_process(COMMAND "${MLA_NVCC}" --dryrun -x cu /dev/null ERROR_VARIABLE dryrun OUTPUT_QUIET)
if(NOT dryrun MATCHES "#\\$ TOP=([^\r\n]+)")
  message(FATAL_ERROR "cannot tell the CUDA root of ${MLA_NVCC}:\n${dryrun}")
endif()
file(REAL_PATH "${CMAKE_MATCH_1}" MLA_CUDA_ROOT)
set(MLA_FATBINARY "${MLA_CUDA_ROOT}/bin/fatbinary")
foreach(file include/cuda.h nvvm/bin/cicc bin/fatbinary)
  if(NOT EXISTS "${MLA_CUDA_ROOT}/${file}")
    message(FATAL_ERROR "${MLA_CUDA_ROOT}/${file} is missing: this toolkit is incomplete.")
  endif()
endforeach()

if(MLA_PTXAS STREQUAL "toolkit" OR (MLA_PTXAS STREQUAL "" AND MLA_SYSTEM_CUDA))
  set(MLA_PTXAS_PATH "${MLA_CUDA_ROOT}/bin/ptxas")
elseif(MLA_PTXAS STREQUAL "")
  mla_find_in_nvidia_packages(cuda_nvcc/bin/ptxas MLA_PTXAS_PATH)
else()
  set(MLA_PTXAS_PATH "${MLA_PTXAS}")
endif()
if(NOT EXISTS "${MLA_PTXAS_PATH}")
  message(FATAL_ERROR "ptxas is missing (`${MLA_PTXAS_PATH}`): install nvidia-cuda-nvcc-cu12, or give MLA_PTXAS.")
endif()
mla_tool_version("${MLA_PTXAS_PATH}" MLA_PTXAS_VERSION)

if(MLA_PTXAS_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR "ptxas ${MLA_PTXAS_VERSION} does not know sm_120: CUDA 12.8 or newer is needed.")
elseif(MLA_PTXAS_VERSION VERSION_LESS 13)
  set(MLA_MIN_DRIVER 525)
  set(MLA_MIN_CUDA 12000)
elseif(MLA_PTXAS_VERSION VERSION_LESS 14)
  set(MLA_MIN_DRIVER 580)
  set(MLA_MIN_CUDA 13000)
else()
  message(FATAL_ERROR "It is not known which driver loads the output of ptxas ${MLA_PTXAS_VERSION}: extend "
    "cmake/Toolkit.cmake.")
endif()
message(STATUS "mla: nvcc ${MLA_NVCC_VERSION} (${MLA_COMPILER_ORIGIN}), ptxas ${MLA_PTXAS_VERSION}: "
  "for drivers >= ${MLA_MIN_DRIVER}")
