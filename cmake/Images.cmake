# Compiles kernels to images (fatbins) and writes the list by which src/images.cpp embeds them.
include_guard(GLOBAL)

# The PTX version of CUDA 12.0, which every driver >= 525 can compile for a chip that the image has no machine code for.
# The machine code is assembled from the same text, so an instruction that this version lacks fails the build.
set(MLA_PTX_VERSION 8.0)
# zstd-compressed images need a driver >= 550; the wheel's own compression makes up for most of it.
set(MLA_COMPRESS_IMAGES 0)
if(MLA_MIN_DRIVER GREATER_EQUAL 550)
  set(MLA_COMPRESS_IMAGES 1)
endif()

set(MLA_IMAGE_DIR "${CMAKE_BINARY_DIR}/images")
file(MAKE_DIRECTORY "${MLA_IMAGE_DIR}")

# mla_add_image(<name> SOURCE <file.cu> TARGETS <a name of Variants.cmake> [DEFINES <macro=value>...])
# makes <build>/images/<name>.fatbin, with the compiler's and assembler's report in <name>.log.
function(mla_add_image name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "SOURCE;TARGETS" "DEFINES")
  set(source "${CMAKE_CURRENT_SOURCE_DIR}/${arg_SOURCE}")
  if(NOT EXISTS "${source}")
    message(FATAL_ERROR "image `${name}` needs ${arg_SOURCE}, which does not exist.")
  endif()
  if(NOT DEFINED MLA_TARGETS_${arg_TARGETS})
    message(FATAL_ERROR "image `${name}` has targets `${arg_TARGETS}`, which cmake/Variants.cmake does not define.")
  endif()
  get_property(names GLOBAL PROPERTY MLA_IMAGE_NAMES)
  if("${name}" IN_LIST names)
    message(FATAL_ERROR "two images have the name `${name}`.")
  endif()
  set_property(GLOBAL APPEND PROPERTY MLA_IMAGE_NAMES "${name}")

  set(machine_archs ${MLA_TARGETS_${arg_TARGETS}})
  list(POP_FRONT machine_archs virtual_arch)
  # Custom commands do not get CMAKE_BUILD_TYPE's flags; the images are optimised in every configuration.
  set(flags -std=c++17 -O3 -DNDEBUG -ccbin "${CMAKE_CXX_COMPILER}" "-I${CMAKE_CURRENT_SOURCE_DIR}/kernels")
  list(TRANSFORM arg_DEFINES PREPEND "-D")
  list(APPEND flags ${arg_DEFINES})
  if(MLA_LINEINFO)
    list(APPEND flags -lineinfo)
  endif()

  set(script "${CMAKE_CURRENT_SOURCE_DIR}/cmake/compile_kernel.py")
  set(image "${MLA_IMAGE_DIR}/${name}.fatbin")
  add_custom_command(
    OUTPUT "${image}"
    COMMAND "${Python_EXECUTABLE}" "${script}"
            --nvcc "${MLA_NVCC}" --ptxas "${MLA_PTXAS_PATH}" --fatbinary "${MLA_FATBINARY}"
            --virtual-arch ${virtual_arch} --machine-archs ${machine_archs} --ptx-version ${MLA_PTX_VERSION}
            --strict $<BOOL:${MLA_STRICT}> --compress ${MLA_COMPRESS_IMAGES} --output "${image}" "${source}" -- ${flags}
    DEPENDS "${source}" "${script}" "${MLA_NVCC}" "${MLA_PTXAS_PATH}"
    DEPFILE "${image}.d"
    COMMENT "Compiling image ${name}"
    VERBATIM)
endfunction()

# Writes images.inc, a list MLA_IMAGE(<name>, "<path>"), and sets its folder and the paths of all images.
function(mla_write_image_list folder_out images_out)
  get_property(names GLOBAL PROPERTY MLA_IMAGE_NAMES)
  set(images "")
  set(list "")
  foreach(name IN LISTS names)
    list(APPEND images "${MLA_IMAGE_DIR}/${name}.fatbin")
    string(APPEND list "MLA_IMAGE(${name}, \"${MLA_IMAGE_DIR}/${name}.fatbin\")\n")
  endforeach()
  file(CONFIGURE OUTPUT "${MLA_IMAGE_DIR}/images.inc" CONTENT "${list}" @ONLY)
  set(${folder_out} "${MLA_IMAGE_DIR}" PARENT_SCOPE)
  set(${images_out} "${images}" PARENT_SCOPE)
endfunction()
