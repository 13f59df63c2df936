// Compiled once for each instruction set (setup.py), in whose namespace ICRL_ISA its code is.
#include "linear_attention/rwkv7.inl"
