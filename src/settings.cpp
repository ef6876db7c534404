#include "settings.h"

#include <cstdlib>

namespace mla::settings {
namespace {

std::string_view value_of(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

}  // namespace

std::string_view forced_variant() { return value_of("MLA_VARIANT"); }

bool logs_dispatch() { return value_of("MLA_LOG") == "dispatch"; }

bool validates() {
  const std::string_view value = value_of("MLA_VALIDATE");
  return !value.empty() && value != "0";
}

}  // namespace mla::settings
