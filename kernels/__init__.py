"""Fused kernels of the alignment path; README.md in this folder says what each is worth.

One file per kernel: formula and derivative, the torch reference (the specification, and what runs without Triton), the
Triton kernels, the autograd function, and one public function with `impl=None|"triton"|"torch"`.
"""
