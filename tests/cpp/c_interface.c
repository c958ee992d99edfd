/* The header as C99, seen from a C compiler: sizes and offsets for test_api.cpp to compare, and the initialiser. */
#include "fusedmerge/fusedmerge.h"

size_t c_layout(size_t index) {
    const size_t layout[] = {sizeof(fusedmerge_switch_target),
                             offsetof(fusedmerge_switch_target, base_scale),
                             offsetof(fusedmerge_switch_target, base_scale_stride),
                             offsetof(fusedmerge_switch_target, reserved),
                             sizeof(fusedmerge_switch_options),
                             offsetof(fusedmerge_switch_options, mode),
                             offsetof(fusedmerge_switch_options, device),
                             sizeof(fusedmerge_switch_figures),
                             sizeof(fusedmerge_switch_state),
                             offsetof(fusedmerge_switch_state, gates),
                             sizeof(fusedmerge_result)};
    return index < sizeof(layout) / sizeof(layout[0]) ? layout[index] : 0;
}

fusedmerge_switch_options c_options(void) {
    fusedmerge_switch_options options = FUSEDMERGE_SWITCH_OPTIONS_INIT;
    return options;
}
