// Compiled once for each instruction set (setup.py), in whose namespace ICRL_ISA its code is.
#include "cpu/gated_delta_rule.inl"
