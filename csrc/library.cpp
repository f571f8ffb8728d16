// The schemas of every op, in the namespace lungkit or, for the emulated CUDA kernels, one of their own.
#include <torch/csrc/stable/library.h>

#include "attention_gate/schema.h"
#include "confusion_counts/schema.h"
#include "dice_ce/schema.h"
#include "gate_tail/schema.h"
#include "norm_act/schema.h"

#ifdef LUNGKIT_EMULATE
#define LUNGKIT_NAMESPACE LUNGKIT_EMULATE
#else
#define LUNGKIT_NAMESPACE lungkit
#endif
#define LUNGKIT_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)

LUNGKIT_LIBRARY(LUNGKIT_NAMESPACE, m) {
  lungkit::define_attention_gate(m);
  lungkit::define_confusion_counts(m);
  lungkit::define_dice_ce(m);
  lungkit::define_gate_tail(m);
  lungkit::define_norm_act(m);
}
