# Reads the table of variants (kernels/variants.inc) and adds the image of each row.
include_guard(GLOBAL)

# What the images of a `targets` column hold: the virtual architecture that nvcc compiles for, then the machine
# architectures that ptxas makes of its PTX. The PTX itself is added when its architecture has no suffix (that of
# compute_90a would run on 9.0 only).
set(MLA_TARGETS_any compute_80 sm_80 sm_86 sm_90a sm_120)
set(MLA_TARGETS_before_sm90 compute_80 sm_80 sm_86)
set(MLA_TARGETS_from_sm90 compute_90 sm_90a sm_120)  # with the instructions of programmatic dependent launch
set(MLA_TARGETS_ampere_163k compute_80 sm_80 sm_90a)
set(MLA_TARGETS_ampere_99k compute_80 sm_86 sm_120)  # sm_86 code also runs on 8.9
set(MLA_TARGETS_hopper compute_90a sm_90a)

function(mla_add_variant_images table)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${table}")
  file(STRINGS "${table}" rows REGEX "^MLA_VARIANT\\(")
  foreach(row IN LISTS rows)
    string(REGEX REPLACE "^MLA_VARIANT\\((.*)\\).*$" "\\1" row "${row}")
    string(REPLACE " " "" row "${row}")
    string(REPLACE "," ";" columns "${row}")
    list(LENGTH columns num_columns)
    if(NOT num_columns EQUAL 11)
      message(FATAL_ERROR "${table}: a row has ${num_columns} columns instead of 11: MLA_VARIANT(${row})")
    endif()
    list(GET columns 0 2 4 5 6 10 columns)
    list(POP_FRONT columns pipeline d_qk block_rows block_n stages targets)
    string(REGEX REPLACE "_.*" "" arch "${pipeline}")
    # src/registry.cpp asserts that it derives the same.
    set(name "${pipeline}_r${block_rows}_n${block_n}_s${stages}_d${d_qk}")
    string(REPLACE "," "\\," escaped_row "${row}")  # to nvcc, a bare comma begins another macro
    mla_add_image(${name} SOURCE kernels/${arch}/${pipeline}.cu TARGETS ${targets} DEFINES "MLA_ROW=${escaped_row}")
  endforeach()
endfunction()
