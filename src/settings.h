// The environment variables that are read at run time. A change in Python's os.environ is seen by the next call.
#pragma once

#include <string_view>

namespace mla {

constexpr const char *kVariantVariable = "MLA_VARIANT", *kLogVariable = "MLA_LOG", *kValidateVariable = "MLA_VALIDATE";

struct Settings {
  std::string_view forced_variant;  // MLA_VARIANT; empty: none
  bool logs_dispatch = false;       // MLA_LOG=dispatch
  bool validates = false;           // MLA_VALIDATE is neither empty nor 0
};

// As they are now. The text is good until the environment changes.
Settings read_settings();

}  // namespace mla
