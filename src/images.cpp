// Embeds the images as they are, by the assembler's .incbin: it takes no compile time, unlike a C array.
#include "images.h"

#include <iterator>
#include <stdexcept>
#include <string>

#define MLA_IMAGE(name, path)                             \
  asm(".pushsection .rodata.mla_images,\"a\",%progbits\n" \
      ".balign 64\n"                                      \
      ".globl mla_image_" #name                           \
      "\n"                                                \
      ".hidden mla_image_" #name                          \
      "\n"                                                \
      "mla_image_" #name                                  \
      ":\n"                                               \
      ".incbin \"" path                                   \
      "\"\n"                                              \
      ".globl mla_image_end_" #name                       \
      "\n"                                                \
      ".hidden mla_image_end_" #name                      \
      "\n"                                                \
      "mla_image_end_" #name                              \
      ":\n"                                               \
      ".byte 0\n"                                         \
      ".popsection\n");                                   \
  extern "C" __attribute__((visibility("hidden"))) const unsigned char mla_image_##name[], mla_image_end_##name[];
#include "images.inc"
#undef MLA_IMAGE

namespace mla {

#define MLA_IMAGE(name, path) {#name, mla_image_##name, mla_image_end_##name},
const Image kImages[] = {
#include "images.inc"
};
#undef MLA_IMAGE
const size_t kNumImages = std::size(kImages);

const Image& find_image(std::string_view name) {
  for (const Image& image : kImages)
    if (image.name == name) return image;
  throw std::out_of_range("no image has the name " + std::string(name));
}

}  // namespace mla
