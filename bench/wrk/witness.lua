-- What the scripts share: reading lists, sending requests in turn, saying at the end what was seen, as JSON.

local witness = {}

function witness.lines(path)
  local all = {}
  for line in io.lines(path) do all[#all + 1] = line end
  assert(#all > 0, path .. " is empty")
  return all
end

-- Sends these requests in turn; each thread begins at a place of its own.
function witness.send(requests)
  math.randomseed(tonumber(tostring({}):match("0x(%x+)"), 16) % 2 ^ 31)
  local next = math.random(#requests)
  request = function()
    next = next % #requests + 1
    return requests[next]
  end
end

function witness.tell(summary)
  local errors = summary.errors
  io.write(string.format('\n{"requests":%d,"refused":%d,"failed":%d,"seconds":%.6f}\n', summary.requests,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout, summary.duration / 1e6))
end

return witness
