// Included by csrc/arithmetic.h, which converts bfloat16 by integer arithmetic and needs no name of it.
#pragma once
