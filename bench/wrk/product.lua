-- GET of each product in turn: wrk -s product.lua URL -- PRODUCTS

local witness = require("witness")

function init(args)
  local requests = {}
  for _, product in ipairs(witness.lines(args[1])) do
    requests[#requests + 1] = wrk.format("GET", "/api/product/" .. product)
  end
  witness.send(requests)
end

function done(summary) witness.tell(summary) end
