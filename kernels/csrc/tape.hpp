// Kernel calls noted once and made again without Python: between two steps of the same shape only the memory changes.
#pragma once
#include "arguments.hpp"

// Adds functions to the module that note their calls while this thread records. 0, or -1 with an exception.
int add_recordable(PyObject* module, const PyMethodDef* methods);
