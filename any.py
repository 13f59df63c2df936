from lib import apply
M = '''
AnyMDP's transition rows in one pass: what `_rows` of anymdp_reference.py does to tables in a dozen, for GPUs.

Symbols. Tensors are contiguous.
  B, S, A      tasks; states of the largest task; actions
  W            constexpr, the power of two that holds S, at least 16: next states of a program
  key          int64 [B], the stream of a task's weights
  size         int64 [B], states of a task
  first, end   int64 [B, S], a state's window of successors, first to end - 1; empty where it has none
  sigma        float64 [B, S], width of a state's bells, in states
  center       float64 [B, S, A], center of each action's bell
  self_loop    float64 [1], what a state's own weight is multiplied by
  out          float64 [B, S, A, S], the rows: probabilities of next states, rounded to float32
  z, u         int64 and float64 of any shape: hashed numbers, uniform numbers

A program has one state of one task. Weights of next states are hashed and bells of actions computed in registers, twice
rather than kept; rows are written once, in float64 of float32's precision.
'''
D = {"_rows": '''
Grid B·S: a state of a task, with all its actions. Reads key, size, first, end, sigma, center, self_loop. Writes out's
A rows; they are zero where the window is empty.'''}
apply("tabular/anymdp_triton.py", M, D)
