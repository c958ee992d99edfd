#   make sim          build/sim/libfusedmerge_sim.so, the kernels on the host; needs only $(PYTHON) and a C++ compiler
#   make sim-sanitize run the simulator's suite under AddressSanitizer and UndefinedBehaviorSanitizer
#   make sim-ptx      run the suite on the PTX that nvcc makes of the kernels for each architecture
#   make sim-traffic  count what kernels ask of memory: docs/kernels/traffic.md
#   make sim-mutants  remove each barrier and wait in turn; every mutant must be caught
SIM_SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so.6)

SIM_SUITES := tests/test_sim_switch.py tests/test_sim_plan.py tests/test_sim_linear.py tests/test_linear.py tests/test_sim_group.py tests/test_sim_sgmv.py tests/test_sgmv.py

.PHONY: sim sim-sanitize sim-ptx sim-traffic sim-mutants

sim:
	$(PYTHON) tests/sim/build.py

sim-sanitize: $(STAMP)
	library=$$($(PY) tests/sim/build.py --sanitize) && LD_PRELOAD="$(SIM_SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	    FUSEDMERGE_SIM_LIB=$$library $(PY) -m pytest -s $(SIM_SUITES) -k "not thousand and not just_in_time"

sim-ptx: $(STAMP)
	for arch in 80 90 100 120; do FUSEDMERGE_PTX_ARCH=compute_$$arch $(PYTEST) $(SIM_SUITES) -k ptx || exit 1; done

sim-mutants: $(STAMP)
	$(PY) tests/sim/mutants.py

sim-traffic: $(STAMP)
	$(PY) tests/sim/traffic.py --markdown docs/kernels/traffic.md
