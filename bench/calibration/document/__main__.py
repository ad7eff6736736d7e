from bench.calibration.document.page import COMMAND, app

app(prog_name=COMMAND)
