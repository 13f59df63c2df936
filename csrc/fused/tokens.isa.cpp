// Compiled once for each instruction set (setup.py), in whose namespace ICRL_ISA its code is.
#include "fused/tokens.inl"
