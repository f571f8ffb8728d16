// The schemas of every op, in the namespace lungkit or, for the emulated CUDA kernels, lungkit_emulated.
#include <torch/csrc/stable/library.h>

#include "attention_gate/schema.h"
#include "confusion_counts/schema.h"
#include "dice_ce/schema.h"
#include "gate_tail/schema.h"
#include "norm_act/schema.h"

#ifdef LUNGKIT_EMULATE
STABLE_TORCH_LIBRARY(lungkit_emulated, m) {
#else
STABLE_TORCH_LIBRARY(lungkit, m) {
#endif
  lungkit::define_attention_gate(m);
  lungkit::define_confusion_counts(m);
  lungkit::define_dice_ce(m);
  lungkit::define_gate_tail(m);
  lungkit::define_norm_act(m);
}
