// The environment variables that are read at run time. A change in Python's os.environ is seen by the next call.
#pragma once

#include <string_view>

namespace mla::settings {

std::string_view forced_variant();  // MLA_VARIANT; empty: none
bool logs_dispatch();               // MLA_LOG=dispatch
bool validates();                   // MLA_VALIDATE is neither empty nor 0

}  // namespace mla::settings
