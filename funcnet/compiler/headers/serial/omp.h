// OpenMP on one thread, for programs that are compiled without its library.

#pragma once

inline int omp_get_thread_num() { return 0; }
inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_threads() { return 1; }
inline int omp_in_parallel() { return 0; }
