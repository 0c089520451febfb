"""stub"""

get_softmax_n = set_softmax_n = strip_softmax_n = None
