#   make sim          build/sim/libfusedmerge_sim.so, the kernels on the host; needs only $(PYTHON) and a C++ compiler
#   make sim-sanitize run the simulator's suite under AddressSanitizer and UndefinedBehaviorSanitizer
#   make sim-mutants  remove each barrier and wait in turn; every mutant must be caught
SIM_SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so.6)

.PHONY: sim sim-sanitize sim-mutants

sim:
	$(PYTHON) tests/sim/build.py

sim-sanitize: $(STAMP)
	library=$$($(PY) tests/sim/build.py --sanitize) && LD_PRELOAD="$(SIM_SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	    FUSEDMERGE_SIM_LIB=$$library $(PY) -m pytest -s tests/test_sim_switch.py tests/test_sim_plan.py \
	    tests/test_sim_linear.py tests/test_linear.py tests/test_sim_sgmv.py -k "not thousand"

sim-mutants: $(STAMP)
	$(PY) tests/sim/mutants.py
