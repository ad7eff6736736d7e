from bench.calibration.document.page import main

main()
