"""What the threads of the compiled library work on: `Job` of rows.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p


class Job(ctypes.Structure):
    """Addresses of tensors, which have to outlive it; what is not given is 0."""

    _fields_ = (
        ("student", c_void_p),
        ("teacher", c_void_p),
        ("student_stride", c_int64),
        ("teacher_stride", c_int64),
        ("rows", c_int64),
        ("vocab", c_int64),
        ("student_gain", c_float),
        ("teacher_gain", c_float),
        ("teacher_is_gap", c_int32),
        ("kind", c_int32),
        ("tail", c_int32),
        ("choose", c_int32),
        ("alpha", c_double),
        ("loss_factor", c_double),
        ("gradient_factor", c_double),
        ("k", c_int64),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("values", c_void_p),
        ("done", c_void_p),
        ("next", c_int64),
    )
